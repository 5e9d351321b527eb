"""From a file to a uint8 tensor [3, H, W]: find it, decode it, draw it at its geometry, by one of two backends.

exact: Pillow decodes and resizes, bit for bit what CLIP, open_clip and CLIP4Cir do.
fast: torchvision decodes JPEG files (the same bits), torch resizes uint8 tensors (at most 2 grey levels apart); the few
shapes that Pillow resizes rows first, such as tall pictures and enlarged ones, it still resizes.
"""

import dataclasses
import io
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from cliplab.data.geometry import Geometry, Preprocess, evaluation_crop, random_crop, target_border
from cliplab.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png")
# What Pillow raises for broken files.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ImageFolder:
    """Images by name (without extension), in a folder and its direct sub-folders; listed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.same_name: list[tuple[str, str]] = []  # pairs of files that share a name; the first one is taken
        self._paths: dict[str, str] = {}
        below = self._list(str(root)) if root.is_dir() else []
        for folder in below:
            self._list(folder)

    def _list(self, folder: str) -> list[str]:
        """Take in the pictures of a folder; the folders in it."""
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name, extension = os.path.splitext(entry.name)
            if extension.lower() in EXTENSIONS and (first := self._paths.setdefault(name, entry.path)) != entry.path:
                self.same_name.append((first, entry.path))
        return [entry.path for entry in found if entry.is_dir()]

    @classmethod
    def of(cls, root: Path, places: Mapping[str, str]) -> "ImageFolder":
        """The images that annotations place themselves: name -> path below the root; those that are there."""
        folder = cls.__new__(cls)
        folder.root, folder.same_name = root, []
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
    """Decode to RGB: palette, RGBA, greyscale and CMYK files included; an EXIF orientation is ignored.

    Raises UserError naming an unreadable file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"no image file {path}") from error
    except _BROKEN as error:
        raise UserError(f"can't read the image {path}: {error}. The file is damaged or no image: replace it") from error


def read_pixels(path: str | Path) -> Tensor:
    """As `read_image`, but uint8 [3, H, W], where torchvision decodes the JPEG files: the same bits and errors."""
    from torchvision.io import ImageReadMode, decode_jpeg  # heavy: exact doesn't need it

    encoded = _jpeg(path)
    if encoded is not None:
        try:
            decoded = decode_jpeg(torch.frombuffer(encoded, dtype=torch.uint8), ImageReadMode.RGB)
            assert isinstance(decoded, Tensor)  # it is a list for a list
            return decoded
        except RuntimeError:
            pass  # Pillow says what is wrong with the file, or reads it after all
    return pixels_of(read_image(path))


def _jpeg(path: str | Path) -> bytearray | None:
    """The file, if Pillow takes it for a JPEG file that it would decode."""
    try:
        encoded = Path(path).read_bytes()
        with Image.open(io.BytesIO(encoded)) as image:  # reads the header only
            return bytearray(encoded) if isinstance(image, JpegImageFile) else None
    except _BROKEN:
        return None


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def draw_exact(image: Image.Image, geometry: Geometry, interpolation: str) -> Tensor:
    """uint8 [3, H, W] by Pillow."""
    if any(geometry.border):
        image = ImageOps.expand(image, geometry.border * 2, fill=0)
    if geometry.part != (0, 0, *image.size):
        image = image.crop(geometry.part)
    if geometry.resized != image.size:
        image = image.resize(geometry.resized, _FILTERS[interpolation])
    image = image.crop(geometry.window)  # beyond the picture Pillow fills in black
    return pixels_of(ImageOps.mirror(image) if geometry.is_mirrored else image).contiguous()


def draw_fast(pixels: Tensor, geometry: Geometry, interpolation: str) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, H', W'] by torch, whose resizing of uint8 tensors follows Pillow's where it can."""
    horizontal, vertical = geometry.border
    left, top, right, bottom = geometry.part
    part = _window(pixels, (left - horizontal, top - vertical, right - horizontal, bottom - vertical))
    width, height = geometry.resized
    if _is_rows_first(part, width, height):
        part = pixels_of(
            Image.fromarray(part.permute(1, 2, 0).numpy()).resize((width, height), _FILTERS[interpolation])
        )
    elif (height, width) != part.shape[1:]:
        batch = part[None].contiguous(memory_format=torch.channels_last)
        part = F.interpolate(batch, (height, width), mode=interpolation, antialias=True)[0]
    part = _window(part, geometry.window)
    return (part.flip(2) if geometry.is_mirrored else part).contiguous()


def _is_rows_first(pixels: Tensor, width: int, height: int) -> bool:
    """Whether Pillow resizes [3, H, W] along its height before its width; torch never does.

    Both round to uint8 and cut what overshoots in between, so that the order changes pictures by up to 30 grey levels.
    The rule is that of Pillow 13, found by comparing both orders for 11,167 pairs of sizes: all followed it.
    """
    shrinking = pixels.shape[1] - height
    return shrinking > 0 and shrinking > 2 * (pixels.shape[2] - width) and width != pixels.shape[2]


def _window(pixels: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Pixels [3, H, W] inside (left, top, right, bottom), black beyond the picture; colours stay next to each other.

    F.pad does the same ten times slower and moves the colours apart, which slows the resizing down.
    """
    (left, top, right, bottom), (height, width) = box, pixels.shape[1:]
    x, y = (max(left, 0), max(top, 0))
    x_end, y_end = max(min(right, width), x), max(min(bottom, height), y)
    inside = pixels[:, y:y_end, x:x_end]
    if inside.shape[1:] == (bottom - top, right - left):
        return inside
    canvas = torch.zeros(bottom - top, right - left, 3, dtype=pixels.dtype).permute(2, 0, 1)
    canvas[:, y - top : y_end - top, x - left : x_end - left] = inside
    return canvas


BACKENDS = ("exact", "fast")


class ImageTransform:
    """A picture or its file -> uint8 [3, size, size]: pad, resize with antialias, crop; in training a random crop.

    Both backends draw the same geometry from the same random numbers.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        pad: str = "none",
        crop_scale: float = 1.0,
        flip: bool = False,
        backend: str = "exact",
    ) -> None:
        if pad not in ("none", "square", "target"):
            raise UserError(f"data.pad must be none, square or target, got '{pad}'")
        if not 0 < crop_scale <= 1:
            raise UserError(f"data.crop_scale must be in (0, 1], got {crop_scale}")
        if backend not in BACKENDS:
            raise UserError(f"data.image_backend must be exact or fast, got '{backend}'")
        self.preprocess, self.pad, self.crop_scale, self.flip = preprocess, pad, crop_scale, flip
        self.backend = backend

    def __call__(self, image: Image.Image | str | Path, generator: np.random.Generator | None = None) -> Tensor:
        """`generator` None = evaluation. Raises UserError naming a file that is no picture."""
        interpolation = self.preprocess.interpolation
        if self.backend == "exact":
            picture = image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
            return draw_exact(picture, self.geometry(*picture.size, generator), interpolation)
        pixels = pixels_of(image.convert("RGB")) if isinstance(image, Image.Image) else read_pixels(image)
        height, width = pixels.shape[1:]
        return draw_fast(pixels, self.geometry(width, height, generator), interpolation)

    def geometry(self, width: int, height: int, generator: np.random.Generator | None = None) -> Geometry:
        """Where the pixels of a picture of this size go."""
        border = (0, 0)
        if self.pad != "none":
            border = target_border(width, height, 1.25 if self.pad == "target" else 1.0)
        bordered = width + 2 * border[0], height + 2 * border[1]
        if generator is None or self.crop_scale == 1:
            geometry = evaluation_crop(bordered, border, self.preprocess)
        else:
            geometry = random_crop(bordered, border, self.preprocess.size, self.crop_scale, generator)
        is_mirrored = generator is not None and self.flip and generator.random() < 0.5
        return dataclasses.replace(geometry, is_mirrored=is_mirrored)


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> (x / 255 - mean) / std in the precision of `mean` [3, 1, 1]; in one buffer."""
    return pixels.to(mean.dtype, copy=True).div_(255).sub_(mean).div_(std)


class ImagePreprocess:
    """A picture or its file -> float [3, size, size]: RGB, resize, centre crop, (x / 255 - mean) / std."""

    def __init__(self, config: Preprocess, backend: str = "exact") -> None:
        self.config = config
        self._transform = ImageTransform(config, backend=backend)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Raises UserError for a file that is no picture."""
        if not isinstance(image, str | Path | Image.Image):
            raise UserError(f"a picture must be a PIL image or the path of a file, got {type(image).__name__}")
        return normalized(self._transform(image), self._mean, self._std)
