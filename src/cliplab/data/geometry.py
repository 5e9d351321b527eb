"""Where the pixels of a picture go, as numbers: pad, take a part, resize, centre crop, mirror. Knows no picture.

Every image backend draws the same geometry, so backends can differ in grey levels and in nothing else.
"""

from dataclasses import dataclass
from typing import Literal, get_type_hints

import numpy as np

from cliplab.errors import UserError
from cliplab.registry import fits

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the input of a model; size, mean and std belong to the weights."""

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"  # longest: padded with black to a square
    crop_rounding: Literal["half_even", "floor"] = "half_even"  # torchvision (OpenAI, open_clip) or Hugging Face

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key, hint in hints.items():
            if not fits(getattr(self, key), hint):
                raise UserError(f"preprocessing: {key} must be {hint}, got {getattr(self, key)!r}")
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise UserError(f"preprocessing: size must be 1 or more, mean and std three numbers, no std 0: {self}")


@dataclass(frozen=True)
class Geometry:
    """What is done to one picture, in whole pixels and in this order."""

    border: tuple[int, int]  # black columns on the left and on the right, black rows above and below
    part: tuple[int, int, int, int]  # left, top, right, bottom of what is kept of the bordered picture
    resized: tuple[int, int]  # width, height of the part after resizing
    window: tuple[int, int, int, int]  # what is kept of that; black where it reaches beyond
    is_mirrored: bool = False


def target_border(width: int, height: int, ratio: float) -> tuple[int, int]:
    """CLIP4Cir's TargetPad: the border that makes long / short = `ratio`; none where it is lower, or half a pixel."""
    if max(width, height) / min(width, height) < ratio:
        return 0, 0
    scaled = max(width, height) / ratio
    return max(int((scaled - width) / 2), 0), max(int((scaled - height) / 2), 0)


def evaluation_crop(bordered: tuple[int, int], border: tuple[int, int], preprocess: Preprocess) -> Geometry:
    """The whole picture resized, then its centre. `bordered`: width and height of the picture with its border."""
    (width, height), size = bordered, preprocess.size
    if preprocess.resize_mode == "squash":
        resized = size, size
    elif preprocess.resize_mode == "longest":
        ratio = max(width, height) / size
        resized = max(round(width / ratio), 1), max(round(height / ratio), 1)
    elif width <= height:
        resized = size, int(size * height / width)
    else:
        resized = int(size * width / height), size
    left, top = (_centre(side - size, preprocess.crop_rounding) for side in resized)
    return Geometry(border, (0, 0, width, height), resized, (left, top, left + size, top + size))


def _centre(margin: int, rounding: str) -> int:
    """Where the centre crop starts; negative where the picture is padded, the smaller half before it."""
    if margin < 0:
        return -(-margin // 2)
    return int(round(margin / 2)) if rounding == "half_even" else margin // 2


def random_crop(
    bordered: tuple[int, int], border: tuple[int, int], size: int, smallest: float, generator: np.random.Generator
) -> Geometry:
    """A part with a random share of the area in [smallest, 1] and an aspect ratio in [3/4, 4/3], resized to a square.

    torchvision's RandomResizedCrop, but the aspect is drawn among those that fit, so that no crop is cut smaller.
    `bordered`: width and height of the picture with its border.
    """
    width, height = bordered
    share = generator.uniform(smallest, 1.0)
    area = width * height * share
    lowest, highest = max(3 / 4, share * width / height), min(4 / 3, width / height / share)
    if lowest > highest:  # the picture is longer than any crop of this area
        lowest = highest = np.clip(width / height, share * width / height, width / height / share)
    aspect = np.exp(generator.uniform(np.log(lowest), np.log(highest)))
    crop_width = min(width, max(1, round(np.sqrt(area * aspect))))
    crop_height = min(height, max(1, round(np.sqrt(area / aspect))))
    left = int(generator.integers(0, width - crop_width + 1))
    top = int(generator.integers(0, height - crop_height + 1))
    return Geometry(border, (left, top, left + crop_width, top + crop_height), (size, size), (0, 0, size, size))
