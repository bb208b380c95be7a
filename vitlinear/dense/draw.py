"""Draws boxes, masks and label maps that a model found onto the image."""

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
    """Draws masks, and boxes with a line of text each.

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
    # One by one: torchvision paints black where masks that it gets together overlap.
    for mask, color in zip([] if masks is None else masks, colors, strict=False):
        pixels = draw_segmentation_masks(pixels, mask, OPACITY, color)
    width = max(1, round(max(image.size) / 400))
    drawn = to_pil_image(draw_bounding_boxes(pixels, boxes, colors=colors, width=width))
    draw = ImageDraw.Draw(drawn)
    for (left, upper, _, _), label, color in zip(boxes.tolist(), labels, colors, strict=True):
        _tag(draw, left, upper, label, color)
    return drawn


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
    colors = [palette[index] for index in present]
    drawn = to_pil_image(draw_segmentation_masks(pil_to_tensor(image), masks, OPACITY, colors))
    draw, y = ImageDraw.Draw(drawn), 0.0
    for index, color in zip(present, colors, strict=True):
        y = _tag(draw, 0, y, names[index], color)
    return drawn


def _tag(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: Color) -> float:
    """Draws text on a ground of a colour, and returns where the ground ends below."""
    red, green, blue = color
    # ITU-R BT.601: how light a colour looks.
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    _, _, right, lower = draw.textbbox((x + 2, y + 1), text)
    draw.rectangle((x, y, right + 1, lower + 1), fill=color)
    draw.text((x + 2, y + 1), text, fill="white" if dark else "black")
    return float(lower + 2)
