"""From a file to a uint8 tensor [3, H, W]: find it, decode it, pad, resize, crop."""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cliplab.errors import UserError
from cliplab.registry import fits

EXTENSIONS = (".jpg", ".jpeg", ".png")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# What Pillow raises for broken files.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ImageFolder:
    """Images by name (without extension), in a folder and its direct sub-folders; listed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths: dict[str, str] = {}
        folders = [root] if root.is_dir() else []
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in sorted(entries, key=lambda item: item.name):
                    if entry.name.lower().endswith(EXTENSIONS):
                        self._paths.setdefault(Path(entry.name).stem, entry.path)
                    elif entry.is_dir() and Path(entry.path).parent == root:
                        folders.append(Path(entry.path))

    @classmethod
    def of(cls, root: Path, places: Mapping[str, str]) -> "ImageFolder":
        """The images that annotations place themselves: name -> path below the root; those that are there."""
        folder = cls.__new__(cls)
        folder.root = root
        paths = {name: os.path.join(root, place) for name, place in places.items()}
        folder._paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
        return folder

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def path(self, name: str) -> str:
        """The file of an image. Raises UserError if there is none."""
        try:
            return self._paths[name]
        except KeyError:
            raise UserError(f"no image '{name}' in {self.root}") from None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` without a file, sorted."""
        return sorted({name for name in names if name not in self._paths})

    def sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of every image, sorted by name."""
        return [(name, os.stat(path).st_size) for name, path in sorted(self._paths.items())]


def read_image(path: str | Path) -> Image.Image:
    """Decode to RGB: palette, RGBA, greyscale and CMYK files included. Raises UserError naming an unreadable file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"no image file {path}") from error
    except _BROKEN as error:
        raise UserError(f"can't read the image {path}: {error}. The file is damaged or no image: replace it") from error


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


def target_pad(image: Image.Image, ratio: float = 1.25) -> Image.Image:
    """CLIP4Cir's TargetPad: zero-pad the short side until long / short = `ratio`; unchanged when it is lower."""
    width, height = image.size
    if max(width, height) / min(width, height) < ratio:
        return image
    scaled = max(width, height) / ratio
    horizontal, vertical = (max(int((scaled - side) / 2), 0) for side in (width, height))
    return ImageOps.expand(image, (horizontal, vertical, horizontal, vertical), fill=0)


class ImagePreprocess:
    """A picture or its file -> float [3, size, size]: RGB, resize, centre crop, (x / 255 - mean) / std."""

    def __init__(self, config: Preprocess) -> None:
        self.config = config
        self._transform = ImageTransform(config)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Raises UserError for a file that is no picture."""
        if not isinstance(image, str | Path | Image.Image):
            raise UserError(f"a picture must be a PIL image or the path of a file, got {type(image).__name__}")
        picture = image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
        return (self._transform(picture) / 255 - self._mean) / self._std


class ImageTransform:
    """PIL picture -> uint8 [3, size, size]: pad, resize with antialias, centre crop; in training a random crop."""

    def __init__(self, preprocess: Preprocess, pad: str = "none", crop_scale: float = 1.0, flip: bool = False) -> None:
        if pad not in ("none", "square", "target"):
            raise UserError(f"data.pad must be none, square or target, got '{pad}'")
        if not 0 < crop_scale <= 1:
            raise UserError(f"data.crop_scale must be in (0, 1], got {crop_scale}")
        self.preprocess, self.pad, self.crop_scale, self.flip = preprocess, pad, crop_scale, flip

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """`generator` None = evaluation."""
        if self.pad != "none":
            image = target_pad(image, 1.25 if self.pad == "target" else 1.0)
        if generator is not None and self.crop_scale < 1:
            image = self._random_crop(image, generator)
        else:
            image = self._resize_and_crop(image)
        if generator is not None and self.flip and generator.random() < 0.5:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        size, (width, height) = self.preprocess.size, image.size
        resampling = _FILTERS[self.preprocess.interpolation]
        if self.preprocess.resize_mode == "squash":
            return image if image.size == (size, size) else image.resize((size, size), resampling)
        if self.preprocess.resize_mode == "longest":
            ratio = max(width, height) / size
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        elif width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        if (width, height) != image.size:
            image = image.resize((width, height), resampling)
        left, top = self._offset(width), self._offset(height)
        return image.crop((left, top, left + size, top + size))  # beyond the picture Pillow fills in black

    def _offset(self, side: int) -> int:
        """Where the centre crop starts; negative where the picture is padded, the smaller half before it."""
        margin = side - self.preprocess.size
        if margin < 0:
            return -(-margin // 2)
        return int(round(margin / 2)) if self.preprocess.crop_rounding == "half_even" else margin // 2

    def _random_crop(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        width, height = image.size
        share = generator.uniform(self.crop_scale, 1.0)
        area = width * height * share
        # Aspect ratios at which a crop of this area fits into the picture, so that no crop is cut smaller.
        lowest, highest = max(3 / 4, share * width / height), min(4 / 3, width / height / share)
        if lowest > highest:  # the picture is longer than any crop of this area
            lowest = highest = np.clip(width / height, share * width / height, width / height / share)
        aspect = np.exp(generator.uniform(np.log(lowest), np.log(highest)))
        crop_width = min(width, max(1, round(np.sqrt(area * aspect))))
        crop_height = min(height, max(1, round(np.sqrt(area / aspect))))
        left = int(generator.integers(0, width - crop_width + 1))
        top = int(generator.integers(0, height - crop_height + 1))
        size = self.preprocess.size
        box = (left, top, left + crop_width, top + crop_height)
        return image.resize((size, size), _FILTERS[self.preprocess.interpolation], box=box)
