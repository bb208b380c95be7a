"""Drawing what was found."""

import numpy as np
import torch
from PIL import Image

from vitlinear.dense.draw import color_of, draw_classes, draw_detections

GREY = Image.new("RGB", (400, 300), (128, 128, 128))


def test_classes_have_colours_of_their_own() -> None:
    assert len({color_of(index) for index in range(150)}) == 150


def test_boxes_and_masks() -> None:
    boxes = torch.tensor([[50.0, 60.0, 150.0, 200.0], [200.0, 20.0, 390.0, 290.0]])
    masks = torch.zeros(2, 300, 400, dtype=torch.bool)
    masks[0, 100:120, 80:100] = True
    masks[:, 140:160, 80:100] = True
    drawn = np.array(draw_detections(GREY, boxes, [0, 1], ["cat 90 %", "dog"], masks))
    assert drawn.shape == (300, 400, 3)
    for (left, upper, right, lower), index in zip(boxes.int().tolist(), (0, 1), strict=True):
        for y, x in (((upper + lower) // 2, left), ((upper + lower) // 2, right), (lower, left)):
            assert tuple(drawn[y, x]) == color_of(index)
    blended = (np.array(color_of(0)) + 128) / 2
    assert np.abs(drawn[110, 90] - blended).max() <= 1
    both = (np.array(color_of(1)) + blended) / 2
    assert np.abs(drawn[150, 90] - both).max() <= 2
    assert tuple(drawn[250, 120]) == tuple(drawn[250, 300]) == (128, 128, 128)
    # the text stands on a ground of the class's colour in the box's upper left corner
    corner = drawn[61:70, 51:90].reshape(-1, 3)
    assert 0.3 < np.mean((corner == color_of(0)).all(axis=1)) < 1


def test_nothing_found_is_the_image() -> None:
    drawn = draw_detections(GREY, torch.zeros(0, 4), [], [])
    assert np.array_equal(drawn, GREY) and drawn is not GREY


def test_label_map_and_its_legend() -> None:
    labels = np.zeros((300, 400), int)
    labels[:, 200:] = 2
    palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    drawn = np.array(draw_classes(GREY, labels, ["road", "cat", "sky"], palette))
    assert np.abs(drawn[200, 100] - np.array([191.5, 64, 64])).max() <= 1
    assert np.abs(drawn[200, 300] - np.array([64, 64, 191.5])).max() <= 1
    legend = drawn[:40, :60].reshape(-1, 3)
    share = [np.mean((legend == color).all(axis=1)) for color in palette]
    assert share[0] > 0.05 and share[2] > 0.05 and share[1] == 0
    assert legend.min(axis=1).max() > 180  # white text, smoothed
