"""Image folders of tiny pictures, made by hand for the tests of classification."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("dress", "polar_bear", "t-shirt")
COUNTS = {"train": (3, 2, 4), "validation": (2, 0, 1), "test": (1, 3, 2)}  # no polar bear to validate on


def make_image_folder(root: Path, counts: Mapping[str, tuple[int, ...]] | None = None, size: int = 12) -> Path:
    """ROOT/SPLIT/CLASS/n.png, without split folders for the split ""; classes differ in colour, pictures in noise."""
    for split, numbers in (counts or COUNTS).items():
        for label, (name, number) in enumerate(zip(CLASSES, numbers, strict=False)):
            for n in range(number):
                path = root / split / name / f"{split or 'all'}{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                _picture(label, (len(split), label, n), size).save(path)
    return root


def _picture(label: int, seed: tuple[int, ...], size: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 60, (size, size, 3))
    pixels[..., label % 3] += 180
    return Image.fromarray(pixels.astype(np.uint8))
