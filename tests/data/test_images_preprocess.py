"""ImagePreprocess bit by bit: open_clip's image_transform and transformers' processors on Pillow."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

from cliplab.data.geometry import OPENAI_MEAN, OPENAI_STD
from cliplab.data.images import ImagePreprocess, ImageTransform, Preprocess
from cliplab.errors import UserError
from tests.data.test_images import noise
from tests.data.test_real_annotations import needs

SIZES = [
    (32, 32),
    (33, 32),
    (32, 35),
    (64, 64),
    (65, 63),
    (47, 101),
    (101, 47),
    (20, 31),
    (31, 20),
    (7, 5),
    (90, 33),
    (48, 32),
]
SIZES += [(1, 1), (1, 300), (300, 1), (224, 225), (500, 375), (375, 500)]
PHOTOGRAPHS = 12


def open_clips(preprocess: Preprocess) -> Any:
    return open_clip.image_transform(
        preprocess.size,
        is_train=False,
        mean=preprocess.mean,
        std=preprocess.std,
        resize_mode=preprocess.resize_mode,
        interpolation=preprocess.interpolation,
    )


def processor(preprocess: Preprocess) -> Any:
    side = {"height": preprocess.size, "width": preprocess.size}
    options = {"resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation]}
    options |= {"image_mean": list(preprocess.mean), "image_std": list(preprocess.std)}
    if preprocess.resize_mode == "squash":
        return transformers.SiglipImageProcessorPil(size=side, **options)
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": preprocess.size}, crop_size=side, **options)


def pixels(normalised: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """The eight bits of each value before it was normalised; exact, for the steps are far apart."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return ((normalised * std + mean) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [32, 33])
def test_every_bit_is_open_clips(size: int, resize_mode: Any, interpolation: Any) -> None:
    preprocess = Preprocess(size, OPENAI_MEAN, OPENAI_STD, interpolation, resize_mode)
    ours, theirs = ImagePreprocess(preprocess), open_clips(preprocess)
    for number, shape in enumerate(SIZES):
        picture = noise(shape, number)
        if resize_mode == "longest" and max(shape) > 100 * min(shape):
            assert ours(picture).shape == (3, size, size), "open_clip resizes these to no height at all, and fails"
        else:
            assert torch.equal(ours(picture), theirs(picture)), shape


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [32, 33])
def test_every_bit_is_transformers(size: int, resize_mode: Any, interpolation: Any) -> None:
    preprocess = Preprocess(size, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), interpolation, resize_mode, "floor")
    ours, theirs = ImagePreprocess(preprocess), processor(preprocess)
    for number, shape in enumerate(SIZES):
        picture = noise(shape, number)
        expected = theirs(picture, return_tensors="pt").pixel_values[0]
        found = ours(picture)
        assert torch.equal(pixels(found, preprocess), pixels(expected, preprocess)), shape
        assert (found - expected).abs().max() < 1e-6, "the order of the floating-point operations alone"


def test_the_roundings_differ_where_the_margin_is_odd() -> None:
    differing = []
    for shape in ((32, 33), (32, 34), (32, 35), (35, 32), (32, 37), (39, 32)):
        crops = [
            ImageTransform(Preprocess(32, crop_rounding=rounding))(noise(shape)) for rounding in ("half_even", "floor")
        ]
        differing.append(not torch.equal(*crops))
        theirs = open_clips(Preprocess(32))(noise(shape)), processor(Preprocess(32))(noise(shape), return_tensors="pt")
        assert differing[-1] == (
            not torch.equal(pixels(theirs[0], Preprocess(32)), pixels(theirs[1].pixel_values[0], Preprocess(32)))
        )
    assert differing == [False, False, True, True, False, True], "1.5 and 3.5 are rounded up, 0.5 and 2.5 down"


def test_black_is_what_longest_pads_with() -> None:
    made = ImageTransform(Preprocess(32, resize_mode="longest"))(Image.new("RGB", (64, 31), (255, 255, 255)))
    rows = made.amax(dim=(0, 2))
    height = int((rows == 255).sum())
    assert height in (15, 16) and not rows[:7].any() and not rows[-7:].any()


def test_a_file_a_path_and_a_picture_are_the_same(tmp_path: Path) -> None:
    preprocess = ImagePreprocess(Preprocess(32))
    noise((40, 50)).save(tmp_path / "a.png")
    expected = preprocess(noise((40, 50)))
    assert torch.equal(preprocess(tmp_path / "a.png"), expected) and torch.equal(
        preprocess(str(tmp_path / "a.png")), expected
    )
    assert (expected.dtype, tuple(expected.shape)) == (torch.float32, (3, 32, 32))
    with pytest.raises(UserError, match="no image file"):
        preprocess(tmp_path / "b.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_pictures_are_converted_before_they_are_resized(mode: str) -> None:
    """As transformers does; open_clip converts behind the crop, which is the same for greyscale alone."""
    preprocess = Preprocess(32, crop_rounding="floor")
    picture = noise((47, 60)).quantize(16) if mode == "P" else noise((47, 60)).convert(mode)
    found = ImagePreprocess(preprocess)(picture)
    assert torch.equal(found, ImagePreprocess(preprocess)(picture.convert("RGB")))
    expected = processor(preprocess)(picture, return_tensors="pt").pixel_values[0]
    assert torch.equal(pixels(found, preprocess), pixels(expected, preprocess))


def photographs() -> list[Path]:
    root = needs("coco").parent
    found = sorted(path for folder in root.iterdir() if folder.is_dir() for path in folder.rglob("*.jpg"))
    if not found:
        pytest.skip("no photographs are at hand")
    return found[:: max(len(found) // PHOTOGRAPHS, 1)][:PHOTOGRAPHS]


def test_real_photographs_are_open_clips_and_transformers() -> None:
    openai, hugging_face = Preprocess(224), Preprocess(224, crop_rounding="floor")
    for path in photographs():
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
        assert torch.equal(ImagePreprocess(openai)(path), open_clips(openai)(rgb)), path.name
        expected = processor(hugging_face)(rgb, return_tensors="pt").pixel_values[0]
        found = ImagePreprocess(hugging_face)(path)
        assert torch.equal(pixels(found, openai), pixels(expected, openai)), path.name
    assert np.array(rgb).std() > 5
