"""Test crops of arXiv 1409.4842, section 7, 144 of them, as pure geometry scaled to any input size.

Four scales (shorter side 256, 288, 320, 352 for 224 input) x three squares x six views x mirror. The single crop and
the ten crops are subsets, so one pass gives all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import cv2
import numpy as np

from orchestrator.data.transforms.decode import Image

PAPER_INPUT_SIZE = 224
PAPER_SCALES = (256, 288, 320, 352)
SQUARES = 3
VIEWS = 6  # four corners, centre, whole square resized
CROPS_PER_SCALE = SQUARES * VIEWS
NUM_UNMIRRORED = len(PAPER_SCALES) * CROPS_PER_SCALE  # 72; the mirror images double them
NUM_CROPS = 2 * NUM_UNMIRRORED

Box = tuple[int, int, int]  # left, top and side of a square, in pixels

_CENTER_SQUARE, _CENTER_VIEW = 1, 4

# Numbers of the crops: by scale, square and view, then the same mirrored (crop i + 72 is the mirror of crop i).
ONE_CROP = (_CENTER_SQUARE * VIEWS + _CENTER_VIEW,)
_FIVE_CROPS = tuple(_CENTER_SQUARE * VIEWS + view for view in range(5))
TEN_CROPS = (*_FIVE_CROPS, *(NUM_UNMIRRORED + crop for crop in _FIVE_CROPS))
ALL_CROPS = tuple(range(NUM_CROPS))
CROP_SUBSETS: dict[int, tuple[int, ...]] = {1: ONE_CROP, 10: TEN_CROPS, 144: ALL_CROPS}


def compute_scale_sides(size: int) -> tuple[int, ...]:
    """Return the shorter sides that images are resized to for input size `size`: 256 : 288 : 320 : 352 to 224."""
    return tuple(round(side * size / PAPER_INPUT_SIZE) for side in PAPER_SCALES)


def compute_resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return width and height with the shorter side made `shorter` and the aspect kept."""
    if width <= height:
        return shorter, max(shorter, round(height * shorter / width))
    return max(shorter, round(width * shorter / height)), shorter


def compute_boxes(width: int, height: int, size: int) -> list[Box]:
    """Return the 18 boxes of one resized image, squares left to right (top to bottom for portraits), six views each.

    The last view of each square is the square itself, to be resized to `size`.
    """
    side = min(width, height)
    boxes, room = [], side - size
    for square in range(SQUARES):
        left, top = ((longer - side) * square // (SQUARES - 1) for longer in (width, height))
        for dx, dy in ((0, 0), (room, 0), (0, room), (room, room), (room // 2, room // 2)):
            boxes.append((left + dx, top + dy, size))
        boxes.append((left, top, side))
    return boxes


def cut_crops(image: Image, size: int, crops: Sequence[int], out: Image) -> None:
    """Write unmirrored crops (numbers below 72, ascending) of an image (H x W x 3 uint8).

    out: len(crops) x size x size x 3 uint8. The image is resized once for each scale that the crops need.
    """
    height, width = image.shape[:2]
    rows = zip(out, crops, strict=True)
    for scale, same_scale in groupby(rows, key=lambda row: row[1] // CROPS_PER_SCALE):
        target = compute_resized_size(width, height, compute_scale_sides(size)[scale])
        scaled, boxes = resize_image(image, target), compute_boxes(*target, size)
        for row, crop in same_scale:
            x, y, side = boxes[crop % CROPS_PER_SCALE]
            view = scaled[y : y + side, x : x + side]
            row[:] = view if side == size else resize_image(view, (size, size))


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Return `image` at (width, height): pixel areas when it shrinks (no aliasing), bilinear when it grows."""
    method = cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, interpolation=method), dtype=np.uint8)
