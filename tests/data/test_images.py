import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as vision

from cliplab.data.images import ImageTransform, Preprocess, read_image, target_pad
from cliplab.errors import UserError

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


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^no image file {tmp_path / 'a.jpg'}$"):
        read_image(tmp_path / "a.jpg")


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
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^can't read the image {tmp_path / name}: .*replace it$"):
        read_image(tmp_path / name)


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
            read_image(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50


def test_a_picture_too_large_to_be_trusted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise((64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="bomb.png"):
        read_image(tmp_path / "bomb.png")


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
def test_target_pad_is_that_of_clip4cir(size: tuple[int, int]) -> None:
    made, truth = target_pad(noise(size)), clip4cir_target_pad(noise(size), 1.25)
    assert made.size == truth.size and torch.equal(pixels(made), pixels(truth))


@pytest.mark.parametrize("size", PAD_SIZES, ids=str)
def test_pad_modes_are_those_of_clip4cir_before_the_crop(size: tuple[int, int]) -> None:
    plain = ImageTransform(Preprocess(32))
    for pad, truth in (
        ("target", clip4cir_target_pad(noise(size), 1.25)),
        ("square", clip4cir_square_pad(noise(size))),
    ):
        assert torch.equal(ImageTransform(Preprocess(32), pad=pad)(noise(size)), plain(truth))


def test_target_pad_by_hand() -> None:
    assert target_pad(noise((100, 40))).size == (100, 80)
    assert target_pad(noise((40, 100))).size == (80, 100)
    assert target_pad(noise((100, 81))).size == (100, 81)


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


@pytest.mark.parametrize("crop_scale", [0.25, 0.9])
def test_a_random_crop_lies_inside_and_keeps_its_share_of_the_area(
    crop_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, height = 400, 300
    boxes: list[tuple[float, float, float, float]] = []

    def resize(image: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float]):
        boxes.append(box)
        return Image.new("RGB", size)

    monkeypatch.setattr(Image.Image, "resize", resize)
    transform, image = ImageTransform(Preprocess(16), crop_scale=crop_scale), Image.new("RGB", (width, height))
    for seed in range(300):
        transform(image, np.random.default_rng(seed))
    assert len(boxes) == 300 and len(set(boxes)) > 100
    shares = [(right - left) * (bottom - top) / (width * height) for left, top, right, bottom in boxes]
    assert all(0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height for box in boxes)
    assert min(shares) > crop_scale - 0.01
    assert max(shares) > crop_scale + 0.9 * (1 - crop_scale) * 0.9


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
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageTransform(Preprocess(16), **options)
