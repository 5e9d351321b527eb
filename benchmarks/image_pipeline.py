"""From JPEG files to a normalised batch, one loader process: ours beside open_clip's transform and the bare decoder.

python -m benchmarks.image_pipeline [FOLDER]: photographs to use; else noise that compresses as photographs do.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.measure import Row, interleave, show
from cliplab.data.geometry import Preprocess
from cliplab.data.images import ImageTransform, normalized

COUNT, SIZE, BATCH = 480, (500, 375), 48


def write_pictures(folder: Path) -> list[str]:
    """JPEG files of quality 90 with 0.29 bytes per pixel, as COCO's photographs have at this size and quality."""
    generator = np.random.default_rng(0)
    width, height = SIZE
    x, y = np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))
    falloff = np.maximum(np.hypot(x, y), 1 / width) ** -1.5
    paths = []
    for number in range(COUNT):
        noise = np.fft.ifft2(np.fft.fft2(generator.standard_normal((3, height, width))) * falloff).real
        noise = (noise / noise.std() * 50 + 128).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(noise.transpose(1, 2, 0)).save(paths[-1], quality=90)
    return paths


def resized(photographs: list[Path], folder: Path) -> list[str]:
    """Photographs at the size that is asked about."""
    paths = []
    for number in range(COUNT):
        paths.append(str(folder / f"{number}.jpg"))
        Image.open(photographs[number % len(photographs)]).convert("RGB").resize(SIZE).save(paths[-1], quality=90)
    return paths


class Files(Dataset):
    """Paths, each through a transform."""

    def __init__(self, paths: list[str], transform: Callable[[str], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.paths[index])


class Theirs:
    """open_clip's evaluation transform of a file."""

    def __init__(self) -> None:
        self.transform = open_clip.image_transform(224, is_train=False)

    def __call__(self, path: str) -> Tensor:
        """Float [3, 224, 224]."""
        return self.transform(Image.open(path))


def loader(paths: list[str], transform: Callable[[str], Tensor]) -> DataLoader:
    """As the data module's: one process that stays."""
    return DataLoader(Files(paths, transform), BATCH, num_workers=1, persistent_workers=True)


def decode(path: str) -> Tensor:
    """The bare decoder; the size alone is handed on."""
    encoded = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
    pixels: Any = decode_jpeg(encoded, ImageReadMode.RGB)
    return torch.tensor(pixels.shape)


def rows(paths: list[str]) -> list[Row]:
    """Both backends beside open_clip; the normalisation of uint8 batches counts as ours."""
    preprocess = Preprocess()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    loaders = {
        "ours, fast": loader(paths, ImageTransform(preprocess, backend="fast")),
        "ours, exact": loader(paths, ImageTransform(preprocess)),
        "open_clip": loader(paths, Theirs()),
        "bare decode": loader(paths, decode),
    }

    def ours(name: str) -> None:
        for batch in loaders[name]:
            normalized(batch, mean, std)

    def other(name: str) -> None:
        for _ in loaders[name]:
            pass

    sides = {name: (lambda n=name: ours(n) if n.startswith("ours") else other(n)) for name in loaders}
    timings = interleave(sides, rounds=5)
    question = f"{SIZE[0]} x {SIZE[1]} JPEG to a normalised batch of 224, one loader process"
    return [
        timings.row(f"{question}, {side}", f"ours, {side}", peer, len(paths), "images/s", floor)
        for side, peer, floor in (
            ("fast", "open_clip", 2.3),
            ("fast", "bare decode", None),
            ("exact", "open_clip", None),
        )
    ]


def main(arguments: list[str]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = sorted(Path(arguments[0]).rglob("*.jpg")) if arguments else []
        paths = resized(photographs, Path(folder)) if photographs else write_pictures(Path(folder))
        show(rows(paths), "image pipeline")


if __name__ == "__main__":
    main(sys.argv[1:])
