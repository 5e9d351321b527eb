import re
from dataclasses import replace

import numpy as np
import pytest

from cliplab.data.garment_words import describe_change, describe_garment
from cliplab.data.garments import ATTRIBUTES, CATEGORIES, COLOURS, Garment, all_garments

# Which words betray which attribute and value: written apart from the templates on purpose.
SLEEVES = {
    "sleeveless": r"sleeveless|(no|without) sleeves",
    "short": r"(?<!not )(short|shorter)[ -]sleeve(s|d)",
    "long": r"(long|longer)[ -]sleeve(s|d)",
}
PATTERNS = {
    "solid": r"solid|plain|(no|without a) pattern",
    "striped": r"striped|stripes",
    "dotted": r"dotted|dots",
    "checked": r"checked|checks",
}
NECKLINES = {"round": r"round(ed)?[ -]neck", "v": r"\bv[ -]neck", "square": r"square[ -]neck"}
NAMED_LENGTHS = {
    ("dress", "short"): "mini|very short",
    ("dress", "medium"): "midi|knee-length",
    ("dress", "long"): "maxi|ankle-length",
    ("top", "short"): "cropped|waist-length",
    ("top", "medium"): "hip-length|regular-length",
    ("top", "long"): "thigh-length|tunic-length",
}
COMPARED_LENGTHS = {
    ("short", "medium"): "slightly longer",
    ("medium", "long"): "(?<!much )(?<!slightly )longer(?! sleeve)",
    ("short", "long"): "much longer",
    ("medium", "short"): "(?<!much )(?<!slightly )shorter(?! sleeve)",
    ("long", "medium"): "slightly shorter",
    ("long", "short"): "much shorter",
}
SAID_OF_OLD = r" (instead of|rather than|and not) \w+"
WORLD = {category: all_garments(category) for category in CATEGORIES}


def length_words(category: str, length: str) -> str:
    return NAMED_LENGTHS["dress" if category == "dress" else "top", length]


def named_values(caption: str, reference: Garment) -> dict[str, set[str]]:
    """Attribute -> the new values that a caption names, read by the tables above."""
    caption = re.sub(SAID_OF_OLD, "", caption)
    found = {
        "colour": {colour for colour in COLOURS if re.search(rf"\b{colour}\b", caption)},
        "pattern": {value for value, words in PATTERNS.items() if re.search(words, caption)},
        "sleeves": {value for value, words in SLEEVES.items() if re.search(words, caption)},
        "neckline": {value for value, words in NECKLINES.items() if re.search(words, caption)},
        "length": {
            value
            for value in ATTRIBUTES["length"]
            if re.search(length_words(reference.category, value), caption)
            or re.search(COMPARED_LENGTHS.get((reference.length, value), "(?!)"), caption)
        },
    }
    return {name: values for name, values in found.items() if values}


def random_change(rng: np.random.Generator, size: int) -> tuple[Garment, Garment]:
    garments = WORLD[CATEGORIES[rng.integers(3)]]
    reference = garments[rng.integers(len(garments))]
    target = reference
    for name in rng.choice(list(ATTRIBUTES), size, replace=False):
        others = [value for value in ATTRIBUTES[name] if value != getattr(reference, name)]
        target = replace(target, **{str(name): others[rng.integers(len(others))]})
    return reference, target


@pytest.mark.parametrize("size", [1, 2])
def test_captions_name_each_change_and_nothing_else(size: int) -> None:
    rng = np.random.default_rng(size)
    complete = 0
    for _ in range(2000):
        reference, target = random_change(rng, size)
        captions = describe_change(reference, target, rng)
        named = [named_values(caption, reference) for caption in captions]
        wanted = {name: {getattr(target, name)} for name in reference.changes(target)}
        for caption, found in zip(captions, named, strict=True):
            assert found.items() <= wanted.items() and found, (caption, reference, target)
            # Short and long sleeves are both longer than none: that comparison would have two answers.
            assert "sleeveless" not in (reference.sleeves, target.sleeves) or "er sleeves" not in caption
        assert named[0] | named[1] == wanted, (captions, reference, target)
        assert captions[0] != captions[1]
        complete += named[0] == named[1] == wanted
    assert complete == 2000 if size == 1 else 0.77 < complete / 2000 < 0.83


def test_wording_varies() -> None:
    rng = np.random.default_rng(0)
    reference = Garment("dress", "blue", "solid", "short", "medium", "round")
    target = replace(reference, colour="red", sleeves="long")
    assert len({caption for _ in range(200) for caption in describe_change(reference, target, rng)}) > 80


def test_three_changes_are_refused() -> None:
    reference = Garment("dress", "blue", "solid", "short", "medium", "round")
    target = replace(reference, colour="red", sleeves="long", neckline="v")
    with pytest.raises(AssertionError, match="one or two changes"):
        describe_change(reference, target, np.random.default_rng(0))


def test_descriptions_name_category_colour_pattern_and_more_and_only_what_is_true() -> None:
    rng = np.random.default_rng(0)
    nouns = {"dress": r"\bdress\b", "shirt": r"\bshirt\b", "toptee": r"\b(top|tee)\b"}
    for _ in range(2000):
        garment, _ = random_change(rng, 1)
        caption = describe_garment(garment, rng)
        found = named_values(caption, garment)
        assert re.search(nouns[garment.category], caption), caption
        assert {"colour", "pattern"} < found.keys(), caption
        assert all(values == {getattr(garment, name)} for name, values in found.items()), (caption, garment)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
