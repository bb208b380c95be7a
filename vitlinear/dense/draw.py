"""What detectors and segmentors found, drawn onto the image."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

OPACITY = 0.5
# A step around the circle of hues after which neighbours differ much and no two are the same.
GOLDEN_RATIO = 0.618034

Color = tuple[int, int, int]


def color_of(index: int) -> Color:
    """Returns the colour of a class, the same in each image."""
    red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, 0.85, 1 - index % 3 * 0.2)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image,
    boxes: Tensor,
    classes: Sequence[int],
    labels: Sequence[str],
    masks: Tensor | None = None,
) -> Image.Image:
    """Draws boxes with a line of text each.

    Args:
        image: RGB.
        boxes: [N, 4] left, upper, right, lower edge in pixels of the image.
        classes: N class indices, which choose the colours.
        labels: N texts.
        masks: [N, H, W], bool.

    Returns:
        A new image of the same size.
    """
    pixels = pil_to_tensor(image)
    if len(boxes) == 0:
        return image.copy()
    colors = [color_of(index) for index in classes]
    if masks is not None:
        pixels = draw_segmentation_masks(pixels, masks, OPACITY, colors)
    width = max(1, round(max(image.size) / 400))
    return to_pil_image(draw_bounding_boxes(pixels, boxes, list(labels), colors, width=width))


def draw_classes(
    image: Image.Image, label_map: np.ndarray, names: Sequence[str], palette: Sequence[Color]
) -> Image.Image:
    """Draws a label map over an image, with the names of the classes that it has.

    Args:
        image: RGB.
        label_map: [H, W], integers that are places in ``names``.
        names: Class names.
        palette: A colour for each name.

    Returns:
        A new image of the same size.
    """
    present = np.unique(label_map).tolist()
    masks = torch.from_numpy(np.stack([label_map == index for index in present]))
    colors = [tuple(palette[index]) for index in present]
    drawn = to_pil_image(draw_segmentation_masks(pil_to_tensor(image), masks, OPACITY, colors))
    draw = ImageDraw.Draw(drawn)
    y = 2
    for index, color in zip(present, colors, strict=True):
        _, _, right, lower = draw.textbbox((14, y), names[index])
        draw.rectangle((0, y - 2, right + 2, lower + 2), fill="black")
        draw.rectangle((2, y, 10, lower), fill=color)
        draw.text((14, y), names[index], fill="white")
        y = lower + 4
    return drawn
