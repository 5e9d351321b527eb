from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cliplab.data.garments import ATTRIBUTES, CATEGORIES, COLOURS, Garment, all_garments, draw

SHIRT = Garment("shirt", "blue", "solid", "short", "medium", "round")
SINGLE_CHANGES = [
    (name, old, new) for name, values in ATTRIBUTES.items() for old, new in zip(values, values[1:], strict=False)
]


def picture(garment: Garment, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.asarray(draw(garment, size, np.random.default_rng(seed)), dtype=np.int16)


def test_every_category_has_each_combination_once() -> None:
    for category in CATEGORIES:
        garments = all_garments(category)
        assert len(set(garments)) == len(garments) == 12 * 4 * 3 * 3 * 3
        assert {garment.category for garment in garments} == {category}


def test_changes_names_what_differs() -> None:
    assert SHIRT.changes(SHIRT) == ()
    assert SHIRT.changes(replace(SHIRT, colour="red", neckline="v")) == ("colour", "neckline")


def test_every_combination_draws() -> None:
    rng = np.random.default_rng(0)
    pictures = set()
    for category in CATEGORIES:
        # Shape does not depend on the colour: one colour in turn suffices.
        shapes = [garment for k, garment in enumerate(all_garments(category)) if k // 108 == k % 12]
        for garment in shapes + [replace(SHIRT, category=category, colour=colour) for colour in COLOURS]:
            drawn = draw(garment, 64, rng)
            assert (drawn.mode, drawn.size) == ("RGB", (64, 64))
            pictures.add(drawn.tobytes())
    assert len(pictures) >= 3 * 108


def test_same_generator_state_draws_the_same_bytes() -> None:
    assert (picture(SHIRT) == picture(SHIRT)).all()
    assert (picture(SHIRT) != picture(SHIRT, seed=1)).any()


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize(("name", "old", "new"), SINGLE_CHANGES)
def test_each_single_change_is_visible(category: str, name: str, old: str, new: str) -> None:
    base = replace(SHIRT, category=category)
    before, after = (picture(replace(base, **{name: value})) for value in (old, new))
    changed = np.abs(before - after).max(axis=2) > 40
    assert changed.sum() >= 24, f"{changed.sum()} pixels tell {old} from {new}"


@pytest.mark.parametrize("category", CATEGORIES)
def test_lengths_stay_apart_under_jitter(category: str) -> None:
    """The lowest red pixel of every medium garment lies between those of all short and all long ones."""
    hems = {}
    for length in ATTRIBUTES["length"]:
        garment = Garment(category, "red", "solid", "sleeveless", length, "round")
        pictures = [picture(garment, seed=seed) for seed in range(40)]
        # Redder than the background and the mannequin ever are.
        hems[length] = [int(np.flatnonzero((p[:, :, 0] - p[:, :, 1] > 90).any(axis=1))[-1]) for p in pictures]
    assert max(hems["short"]) < min(hems["medium"])
    assert max(hems["medium"]) < min(hems["long"])


@pytest.mark.parametrize("colour", COLOURS)
def test_colour_is_the_nearest_named_one_under_any_light(colour: str) -> None:
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    for seed in range(20):
        cloth = np.median(picture(replace(SHIRT, colour=colour), seed=seed)[30:36, 28:36].reshape(-1, 3), axis=0)
        assert names[int(np.abs(palette - cloth).sum(axis=1).argmin())] == colour


def test_pose_and_light_do_not_depend_on_the_garment() -> None:
    corners = [picture(garment)[-3:, :3] for garment in (SHIRT, replace(SHIRT, colour="red", pattern="dotted"))]
    assert (corners[0] == corners[1]).all()


def test_a_larger_picture_shows_the_same() -> None:
    small, large = (draw(SHIRT, size, np.random.default_rng(3)) for size in (64, 128))
    reduced = np.asarray(large.resize((64, 64), Image.Resampling.BOX), dtype=np.int16)
    assert np.abs(reduced - np.asarray(small)).mean() < 4
