import numpy as np
import pytest
from torchvision.transforms import functional as vision

from cliplab.data.geometry import Geometry, Preprocess, evaluation_crop, random_crop, target_border


def test_the_border_by_hand() -> None:
    assert target_border(100, 40, 1.25) == (0, 20)  # 100 / 1.25 = 80
    assert target_border(40, 100, 1.25) == (20, 0)
    assert target_border(100, 81, 1.25) == (0, 0)  # already wide enough
    assert target_border(100, 80, 1.25) == (0, 0)
    assert target_border(100, 77, 1.25) == (0, 1)  # (80 - 77) / 2 = 1.5, rounded down
    assert target_border(7, 4, 1.0) == (0, 1)
    assert target_border(5, 5, 1.0) == (0, 0)


def test_shortest_by_hand() -> None:
    geometry = evaluation_crop((500, 375), (0, 0), Preprocess(224))
    assert geometry == Geometry((0, 0), (0, 0, 500, 375), (298, 224), (37, 0, 261, 224))  # 224 * 500 / 375 = 298.67
    assert evaluation_crop((375, 500), (0, 0), Preprocess(224)).resized == (224, 298)


def test_squash_and_longest_by_hand() -> None:
    assert evaluation_crop((50, 20), (0, 0), Preprocess(10, resize_mode="squash")).resized == (10, 10)
    geometry = evaluation_crop((50, 20), (0, 0), Preprocess(10, resize_mode="longest"))
    assert (geometry.resized, geometry.window) == ((10, 4), (0, -3, 10, 7))  # three rows of black above, three below
    assert (
        evaluation_crop((50, 24), (0, 0), Preprocess(10, resize_mode="longest")).window[1] == -2
    )  # rows: 5; 2 above, 3 below
    assert evaluation_crop((500, 1), (0, 0), Preprocess(10, resize_mode="longest")).resized == (10, 1)


@pytest.mark.parametrize(
    ("margin", "half_even", "floor"),
    [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2), (7, 4, 3)],
)
def test_the_rounding_of_a_centre_by_hand(margin: int, half_even: int, floor: int) -> None:
    for rounding, expected in (("half_even", half_even), ("floor", floor)):
        preprocess = Preprocess(10, crop_rounding=rounding)  # type: ignore[arg-type]
        assert evaluation_crop((10 + margin, 10), (0, 0), preprocess).window == (expected, 0, expected + 10, 10)


def test_the_border_counts_as_picture() -> None:
    geometry = evaluation_crop((100, 80), (0, 20), Preprocess(10))
    assert geometry == Geometry((0, 20), (0, 0, 100, 80), (12, 10), (1, 0, 11, 10))


@pytest.mark.parametrize("smallest", [0.08, 0.25, 0.9])
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (400, 100), (200, 200)], ids=str)
def test_a_random_crop_lies_inside_and_keeps_its_share_of_the_area(size: tuple[int, int], smallest: float) -> None:
    width, height = size
    generator = np.random.default_rng(0)
    made = [random_crop(size, (0, 0), 16, smallest, generator) for _ in range(300)]
    shares, aspects = [], []
    for geometry in made:
        left, top, right, bottom = geometry.part
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (geometry.resized, geometry.window, geometry.is_mirrored) == ((16, 16), (0, 0, 16, 16), False)
        shares.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top))
    assert min(shares) > smallest - 0.01
    assert max(shares) > smallest + 0.81 * (1 - smallest)
    assert abs(np.mean(shares) - (1 + smallest) / 2) < 0.05 * (1 - smallest)
    if size == (400, 300) and smallest == 0.08:  # where most crops fit, as torchvision's
        assert min(aspects) < 0.8 and max(aspects) > 1.25 and all(0.74 <= aspect <= 1.35 for aspect in aspects)
    assert len({geometry.part for geometry in made}) > 100


def test_a_random_crop_may_lie_on_the_border() -> None:
    parts = [random_crop((100, 80), (0, 20), 16, 0.1, np.random.default_rng(seed)).part for seed in range(200)]
    assert max(bottom for _, _, _, bottom in parts) > 60
    assert all(bottom <= 80 and right <= 100 for _, _, right, bottom in parts)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_a_random_crop_of_a_thin_picture_has_at_least_a_pixel(size: tuple[int, int]) -> None:
    for seed in range(50):
        left, top, right, bottom = random_crop(size, (0, 0), 16, 0.01, np.random.default_rng(seed)).part
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_resized_sizes_are_torchvisions() -> None:
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 2000, (200, 2)).tolist():
        expected = vision._compute_resized_output_size((height, width), [224])
        assert list(evaluation_crop((width, height), (0, 0), Preprocess(224)).resized) == expected[::-1]
