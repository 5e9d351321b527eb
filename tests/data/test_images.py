import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as vision

from cliplab.data.geometry import Geometry
from cliplab.data.images import (
    BACKENDS,
    ImagePreprocess,
    ImageTransform,
    Preprocess,
    draw_exact,
    draw_fast,
    pixels_of,
    read_image,
    read_pixels,
)
from cliplab.errors import UserError
from tests.conftest import ROOT

SIZES = [
    (32, 32),
    (33, 32),
    (32, 33),
    (35, 32),
    (32, 35),
    (64, 64),
    (65, 63),
    (47, 101),
    (101, 47),
    (20, 31),
    (31, 21),
    (7, 5),
    (90, 33),
]
ROUNDINGS = ("half_even", "floor")
DATA = Path(os.environ.get("CLIPLAB_TEST_DATA", ROOT.parent / "shared" / "data"))
FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# read_image


def test_a_png_is_read_exactly(tmp_path: Path) -> None:
    noise((9, 7)).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert (read.mode, read.size) == ("RGB", (9, 7))
    assert torch.equal(pixels(read), pixels(noise((9, 7))))
    assert torch.equal(pixels(read_image(str(tmp_path / "a.png"))), pixels(read))


RED = (200, 30, 60)


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("RGB", (4, 4), RED).quantize(4), "palette.png", RED),
        (Image.new("RGBA", (4, 4), (*RED, 10)), "alpha.png", RED),
        (Image.new("L", (4, 4), 77), "grey.png", (77, 77, 77)),
        (Image.new("L", (4, 4), 77), "grey.jpg", (77, 77, 77)),
        (Image.new("LA", (4, 4), (77, 10)), "grey_alpha.png", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "black_and_white.png", (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "cmyk.jpg", (255, 0, 0)),
        (Image.new("RGB", (4, 4), RED).quantize(4), "palette.gif", RED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_picture_becomes_rgb(
    tmp_path: Path, image: Image.Image, name: str, expected: tuple[int, int, int]
) -> None:
    image.save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert (read.mode, read.size) == ("RGB", (4, 4))
    tolerance = 2 if name.endswith("jpg") else 0
    assert np.abs(np.array(read, dtype=int) - np.array(expected)).max() <= tolerance
    assert torch.equal(read_pixels(tmp_path / name), pixels(read))


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=f"^no image file {tmp_path / 'a.jpg'}$"):
        read(tmp_path / "a.jpg")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise((64, 64)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jpg", encoded("jpeg")[: len(encoded("jpeg")) // 2]),
        ("cut.png", encoded("png")[: len(encoded("png")) // 2]),
        ("text.jpg", b"<html>404 Not Found</html>"),
        ("empty.png", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_named_alike_by_both_backends(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    messages = set()
    for backend in BACKENDS:
        with pytest.raises(UserError, match=f"^can't read the image {tmp_path / name}: .*replace it$") as caught:
            ImageTransform(Preprocess(8), backend=backend)(tmp_path / name)
        messages.add(str(caught.value).replace(" at 0x", "").split("<")[0])
    assert len(messages) == 1


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_no_damage_raises_anything_else(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a damaged header may promise gigabytes
    path, whole, rng = tmp_path / f"a.{kind}", encoded(kind), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for position in rng.integers(0, min(len(damaged), 200), 4):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read = read_image(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
            with pytest.raises(UserError, match=str(path)):
                read_pixels(path)
        else:
            assert torch.equal(read_pixels(path), pixels(read))
    assert refused > 50


def test_a_picture_too_large_to_be_trusted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise((64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    noise((64, 64)).save(tmp_path / "bomb.jpg")
    for name in ("bomb.png", "bomb.jpg"):
        for read in (read_image, read_pixels):
            with pytest.raises(UserError, match=f"{name}: .*decompression bomb"):
                read(tmp_path / name)


# Evaluation: resize and centre crop


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
@pytest.mark.parametrize("target", [32, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_evaluation_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], target: int, interpolation: str
) -> None:
    transform = ImageTransform(Preprocess(target, interpolation=interpolation))
    truth = Compose([Resize(target, FILTERS[interpolation]), CenterCrop(target)])
    image = noise(size)
    made = transform(image)
    assert (made.dtype, tuple(made.shape)) == (torch.uint8, (3, target, target))
    assert torch.equal(made, pixels(truth(image)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squash_is_torchvisions_resize_to_a_square(size: tuple[int, int]) -> None:
    made = ImageTransform(Preprocess(32, resize_mode="squash"))(noise(size))
    assert torch.equal(made, pixels(Resize((32, 32), InterpolationMode.BICUBIC)(noise(size))))


def test_the_picture_given_is_not_changed() -> None:
    image = noise((40, 50))
    ImageTransform(Preprocess(32), pad="target", crop_scale=0.5, flip=True)(image, np.random.default_rng(0))
    assert torch.equal(pixels(image), pixels(noise((40, 50))))


def test_a_tensor_owns_its_memory_and_is_contiguous() -> None:
    made = ImageTransform(Preprocess(32))(noise((32, 32)))
    assert made.is_contiguous()
    made += 1  # raises nothing and warns of nothing: the array is writable


# Padding, against the classes of CLIP4Cir's data_utils.py written anew


def clip4cir_target_pad(image: Image.Image, ratio: float) -> Image.Image:
    width, height = image.size
    if max(width, height) / min(width, height) < ratio:
        return image
    scaled = max(width, height) / ratio
    horizontal = max(int((scaled - width) / 2), 0)
    vertical = max(int((scaled - height) / 2), 0)
    return vision.pad(image, [horizontal, vertical, horizontal, vertical], 0, "constant")


def clip4cir_square_pad(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = max(width, height)
    horizontal, vertical = int((longest - width) / 2), int((longest - height) / 2)
    return vision.pad(image, [horizontal, vertical, horizontal, vertical], 0, "constant")


PAD_SIZES = [*SIZES, (50, 40), (51, 40), (40, 51), (41, 33), (100, 10), (11, 100)]


@pytest.mark.parametrize("size", PAD_SIZES, ids=str)
def test_pad_modes_are_those_of_clip4cir_before_the_crop(size: tuple[int, int]) -> None:
    plain = ImageTransform(Preprocess(32))
    for pad, truth in (
        ("target", clip4cir_target_pad(noise(size), 1.25)),
        ("square", clip4cir_square_pad(noise(size))),
    ):
        assert torch.equal(ImageTransform(Preprocess(32), pad=pad)(noise(size)), plain(truth))


# Training: random crop and flip


def test_the_random_crop_is_decided_by_the_generator() -> None:
    transform = ImageTransform(Preprocess(16), crop_scale=0.3, flip=True)
    first, again, other = (transform(noise((40, 50)), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.dtype, tuple(first.shape)) == (torch.uint8, (3, 16, 16))


def test_evaluation_is_never_random() -> None:
    plain, augmented = ImageTransform(Preprocess(16)), ImageTransform(Preprocess(16), crop_scale=0.3, flip=True)
    assert torch.equal(augmented(noise((40, 50))), plain(noise((40, 50))))


def test_without_augmentation_training_is_the_evaluation_crop() -> None:
    transform = ImageTransform(Preprocess(16))
    assert torch.equal(transform(noise((40, 50)), np.random.default_rng(0)), transform(noise((40, 50))))


def test_flips_are_mirrored_half_of_the_time() -> None:
    transform, image = ImageTransform(Preprocess(16), flip=True), noise((16, 16))
    generator = np.random.default_rng(0)
    made = [transform(image, generator) for _ in range(100)]
    flipped = sum(torch.equal(one, pixels(image).flip(2)) for one in made)
    assert flipped + sum(torch.equal(one, pixels(image)) for one in made) == 100
    assert 35 <= flipped <= 65


@pytest.mark.parametrize("pad", ["none", "target"])
def test_the_random_crop_is_torchvisions_resized_crop(pad: str) -> None:
    """Cut first, then resize: no pixel outside of the crop bleeds into it."""
    transform, image = ImageTransform(Preprocess(16), pad=pad, crop_scale=0.3), noise((90, 33))
    padded = clip4cir_target_pad(image, 1.25) if pad == "target" else image
    for seed in range(20):
        left, top, right, bottom = transform.geometry(*image.size, np.random.default_rng(seed)).part
        box = (top, left, bottom - top, right - left)
        truth = vision.resized_crop(padded, *box, [16, 16], InterpolationMode.BICUBIC)
        assert torch.equal(transform(image, np.random.default_rng(seed)), pixels(truth))


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_a_random_crop_of_a_thin_picture_has_at_least_a_pixel(size: tuple[int, int]) -> None:
    for seed in range(20):
        made = ImageTransform(Preprocess(16), crop_scale=0.01)(noise(size), np.random.default_rng(seed))
        assert tuple(made.shape) == (3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": "squared"}, "data.pad must be none, square or target, got 'squared'"),
        ({"crop_scale": 0.0}, r"data.crop_scale must be in \(0, 1\], got 0.0"),
        ({"crop_scale": 1.5}, r"data.crop_scale must be in \(0, 1\], got 1.5"),
        ({"backend": "pillow"}, "data.image_backend must be exact or fast, got 'pillow'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageTransform(Preprocess(16), **options)


# The backends against each other


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_decode_the_same_bits(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    if mode != "RGB":
        options.pop("keep_rgb", None)
    noise((41, 27)).convert(mode).save(tmp_path / "a.jpg", **options)
    assert torch.equal(read_pixels(tmp_path / "a.jpg"), pixels_of(read_image(tmp_path / "a.jpg")))


def test_torchvision_decodes_what_is_a_jpeg_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise((9, 7)).save(tmp_path / "jpeg.png", "jpeg")
    noise((9, 7)).save(tmp_path / "png.jpg", "png")
    assert torch.equal(read_pixels(tmp_path / "png.jpg"), pixels(noise((9, 7))))
    expected = read_image(tmp_path / "jpeg.png")
    monkeypatch.setattr("cliplab.data.images.read_image", None)
    assert torch.equal(read_pixels(tmp_path / "jpeg.png"), pixels(expected))
    with pytest.raises(TypeError):
        read_pixels(tmp_path / "png.jpg")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_orientation_of_exif_is_ignored(tmp_path: Path, backend: str) -> None:
    """As the original pipelines do: they were trained and measured on the stored pixels."""
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    noise((32, 32)).save(tmp_path / "turned.jpg", exif=exif)
    noise((32, 32)).save(tmp_path / "plain.jpg")
    transform = ImageTransform(Preprocess(32), backend=backend)
    assert torch.equal(transform(tmp_path / "turned.jpg"), transform(tmp_path / "plain.jpg"))


def test_what_torchvision_refuses_and_pillow_reads_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("no")

    noise((9, 7)).save(tmp_path / "a.jpg")
    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    assert torch.equal(read_pixels(tmp_path / "a.jpg"), pixels(read_image(tmp_path / "a.jpg")))


def smooth(size: tuple[int, int]) -> Image.Image:
    """As a photograph: neighbours are alike."""
    return noise((7, 5)).resize(size, Image.Resampling.BICUBIC)


def stark(size: tuple[int, int]) -> Image.Image:
    """Black and white pixels: whatever overshoots is cut."""
    return noise(size).convert("1", dither=Image.Dither.NONE).convert("RGB")


def assert_close(fast: torch.Tensor, exact: torch.Tensor) -> None:
    assert (fast.dtype, fast.shape) == (exact.dtype, exact.shape) and fast.is_contiguous()
    assert (fast.int() - exact.int()).abs().max() <= 2


OPTIONS: list[dict[str, Any]] = [
    *({"resize_mode": mode, "crop_rounding": r} for mode in ("shortest", "squash", "longest") for r in ROUNDINGS),
    *({"pad": pad} for pad in ("square", "target")),
    *({"crop_scale": 0.3, "flip": True, "pad": pad} for pad in ("none", "target")),
]


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fast_differs_by_two_grey_levels_at_most(options: dict[str, Any], interpolation: str) -> None:
    options = dict(options)
    names = [name for name in ("resize_mode", "crop_rounding") if name in options]
    chosen: dict[str, Any] = {name: options.pop(name) for name in names}
    preprocess = Preprocess(32, interpolation=interpolation, **chosen)  # type: ignore[arg-type]
    exact, fast = (ImageTransform(preprocess, backend=backend, **options) for backend in BACKENDS)
    for number, size in enumerate([*SIZES, (640, 427), (333, 500), (300, 2), (1, 1), (2000, 1500)]):
        for image in (noise(size), smooth(size), stark(size)):
            assert_close(fast(image), exact(image))
            fast_one, exact_one = (one(image, np.random.default_rng(number)) for one in (fast, exact))
            assert_close(fast_one, exact_one)


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
def test_fast_on_any_change_of_size(interpolation: str) -> None:
    """Tall and flat, smaller and larger, one side each: Pillow's two passes have either order."""
    sides = np.exp(np.random.default_rng(0).uniform(0, np.log(400), (400, 4))).astype(int).tolist()
    for width, height, *resized in [[73, 157, 64, 137], [100, 151, 50, 50], [59, 51, 61, 50], *sides]:
        geometry = Geometry((0, 0), (0, 0, width, height), (resized[0], resized[1]), (0, 0, *resized))
        image = stark((width, height))
        assert_close(draw_fast(pixels_of(image), geometry, interpolation), draw_exact(image, geometry, interpolation))


def test_ordinary_pictures_are_resized_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *_: used.append(image.size) or Image.new("RGB", size)
    )
    fast = ImageTransform(Preprocess(32), backend="fast")
    for size in ((640, 480), (480, 640), (100, 200), (427, 640), (73, 157)):
        fast(noise(size))
    assert used == [(73, 157)]


@pytest.mark.parametrize("part", [(0, 0, 5, 4), (0, 0, 3, 8), (2, 2, 9, 8), (4, 3, 8, 5), (8, 0, 10, 9)], ids=str)
@pytest.mark.parametrize("window", [(0, 0, 6, 6), (-2, -3, 10, 9), (1, 2, 5, 4), (6, 6, 9, 9)], ids=str)
def test_both_backends_draw_any_geometry(part: tuple[int, int, int, int], window: tuple[int, int, int, int]) -> None:
    """Parts that lie on the border in whole or in part, and windows that reach beyond the picture."""
    image = noise((6, 5))
    for resized in ((6, 6), (part[2] - part[0], part[3] - part[1])):
        for is_mirrored in (False, True):
            geometry = Geometry((2, 2), part, resized, window, is_mirrored)
            exact = draw_exact(image, geometry, "bilinear")
            fast = draw_fast(pixels_of(image), geometry, "bilinear")
            assert exact.shape == fast.shape == (3, window[3] - window[1], window[2] - window[0])
            assert (exact.int() - fast.int()).abs().max() <= 2


def test_the_random_numbers_are_those_of_the_other_backend() -> None:
    for seed in range(50):
        states = []
        for backend in BACKENDS:
            generator = np.random.default_rng(seed)
            ImageTransform(Preprocess(8), crop_scale=0.3, flip=True, backend=backend)(noise((20, 30)), generator)
            states.append(generator.random())
        assert states[0] == states[1]


def test_a_picture_and_its_file_are_one(tmp_path: Path) -> None:
    smooth((90, 60)).save(tmp_path / "a.jpg")
    for backend in BACKENDS:
        transform = ImageTransform(Preprocess(32), backend=backend)
        assert torch.equal(transform(tmp_path / "a.jpg"), transform(Image.open(tmp_path / "a.jpg")))


def test_preprocessing_is_exact_unless_it_is_told(tmp_path: Path) -> None:
    smooth((90, 60)).save(tmp_path / "a.jpg")
    preprocess = ImagePreprocess(Preprocess(32))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.config.mean, preprocess.config.std))
    truth = ImageTransform(Preprocess(32), backend="exact")(tmp_path / "a.jpg")
    assert torch.equal(preprocess(tmp_path / "a.jpg"), (truth / 255 - mean) / std)
    assert ImageTransform(Preprocess(32)).backend == "exact"
    fast = ImagePreprocess(Preprocess(32), backend="fast")(tmp_path / "a.jpg") * std + mean
    assert (fast * 255 - truth).abs().max() < 2.01


# Real photographs, where they are at hand


def photographs() -> list[Path]:
    """Some of each data set, the one greyscale JPEG among them."""
    folders = {"coco/val2017": 40, "flickr8k/images": 20, "clothing": 20}
    found = {name: sorted((DATA / name).rglob("*.jp*g")) for name in folders}
    if not all(found.values()):
        pytest.skip("the photographs are not at hand; CLIPLAB_TEST_DATA names their parent folder")
    chosen = [path for name, paths in found.items() for path in paths[:: max(len(paths) // folders[name], 1)]]
    return chosen + [path for path in found["coco/val2017"] if Image.open(path).mode == "L"]


@pytest.mark.parametrize("options", [{}, {"pad": "target"}, {"crop_scale": 0.5, "flip": True}], ids=str)
def test_fast_on_real_photographs(options: dict[str, Any]) -> None:
    paths = photographs()
    assert sum(Image.open(path).mode == "L" for path in paths) >= 1
    exact, fast = (ImageTransform(Preprocess(224), backend=backend, **options) for backend in BACKENDS)
    truth = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224)])
    for path in paths:
        made = [transform(path, np.random.default_rng(1)) for transform in (fast, exact)]
        assert_close(made[0], made[1])
        if not options:
            assert torch.equal(made[1], pixels(truth(Image.open(path).convert("RGB"))))
