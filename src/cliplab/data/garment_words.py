"""What people would say about the garments of the wardrobe: one described, or one changed into another."""

from collections.abc import Sequence

import numpy as np

from cliplab.data.garments import Garment

# What completes "the dress ..." and "the same dress ...", by attribute and new value. A colour is any colour.
_PREDICATES: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {"any": ("is {new}", "is {new} instead of {old}", "comes in {new}", "is {new} and not {old}")},
    "pattern": {
        "solid": ("is plain", "has no pattern", "is a solid color", "is solid instead of {old}"),
        "striped": ("is striped", "has stripes", "has a striped pattern", "is striped rather than {old}"),
        "dotted": ("is dotted", "has dots", "has polka dots", "has a dotted print"),
        "checked": ("is checked", "has checks", "has a checked pattern", "is checked and not {old}"),
    },
    "sleeves": {
        "sleeveless": ("is sleeveless", "has no sleeves", "is without sleeves"),
        "short": ("has short sleeves", "is short-sleeved", "comes with short sleeves"),
        "long": ("has long sleeves", "is long-sleeved", "comes with long sleeves"),
    },
    "neckline": {
        "round": ("has a round neck", "has a rounded neckline", "is round-necked"),
        "v": ("has a v-neck", "has a v neckline", "features a v-neck"),
        "square": ("has a square neck", "has a square neckline", "is square-necked"),
    },
}
_MODIFIERS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {"any": ("in {new}", "in {new} instead of {old}", "in the color {new}")},
    "pattern": {
        "solid": ("in a solid color", "without a pattern", "with no pattern"),
        "striped": ("with stripes", "with a striped pattern", "in a striped fabric"),
        "dotted": ("with dots", "with polka dots", "with a dotted print"),
        "checked": ("with checks", "with a checked pattern", "in a checked fabric"),
    },
    "sleeves": {
        "sleeveless": ("without sleeves", "with no sleeves"),
        "short": ("with short sleeves",),
        "long": ("with long sleeves",),
    },
    "neckline": {
        "round": ("with a round neck", "with a rounded neckline"),
        "v": ("with a v-neck", "with a v neckline"),
        "square": ("with a square neck", "with a square neckline"),
    },
}

# Only comparisons that leave one answer: "longer sleeves" than none could be short or long.
_SLEEVE_COMPARISONS = {("short", "long"): "longer sleeves", ("long", "short"): "shorter sleeves"}
_LENGTH_COMPARISONS = {
    ("short", "medium"): "slightly longer",
    ("short", "long"): "much longer",
    ("medium", "long"): "longer",
    ("medium", "short"): "shorter",
    ("long", "medium"): "slightly shorter",
    ("long", "short"): "much shorter",
}

_TOP_LENGTHS = {
    "short": ("cropped", "waist-length"),
    "medium": ("hip-length", "regular-length"),
    "long": ("thigh-length", "tunic-length"),
}
_LENGTHS = {
    "dress": {"short": ("mini", "very short"), "medium": ("knee-length", "midi"), "long": ("maxi", "ankle-length")},
    "shirt": _TOP_LENGTHS,
    "toptee": _TOP_LENGTHS,
}

_PREDICATE_FRAMES = ("{}", "{}", "{}", "it {}", "the one i want {}")
_MODIFIER_FRAMES = ("is the same but {}", "i would like it {}", "same style {}", "is similar but {}")
_JOINS = (" and ", ", ", " and also ")

_NOUNS = {"dress": ("dress",), "shirt": ("shirt",), "toptee": ("top", "tee")}
_OPENINGS = ("", "", "", "a picture of ", "someone wearing ", "a mannequin in ", "this is ")
_PATTERN_NOUNS = {"solid": "no pattern", "striped": "stripes", "dotted": "dots", "checked": "checks"}


def describe_change(reference: Garment, target: Garment, rng: np.random.Generator) -> tuple[str, str]:
    """Two different captions that together name every changed attribute (one or two), and no other.

    Of two changes, one of the captions leaves out one in a fifth of the cases.
    """
    changes = list(reference.changes(target))
    assert 1 <= len(changes) <= 2, f"captions are made for one or two changes, not {changes}"
    brief = int(rng.integers(2)) if len(changes) == 2 and rng.random() < 0.2 else None
    captions: list[str] = []
    while len(captions) < 2:
        named = [_pick(changes, rng)] if len(captions) == brief else changes
        caption = _change_caption(named, reference, target, rng)
        if caption not in captions:
            captions.append(caption)
    return captions[0], captions[1]


def describe_garment(garment: Garment, rng: np.random.Generator) -> str:
    """A caption with category, colour, pattern and one to three of sleeves, length and neckline."""
    details = ["sleeves", "length", "neckline"]
    rng.shuffle(details)
    details = details[: int(rng.integers(1, 4))]
    before, after = [garment.colour], []
    if rng.random() < 0.75:
        before.append(_pick(("solid", "plain"), rng) if garment.pattern == "solid" else garment.pattern)
    else:
        after.append(_PATTERN_NOUNS[garment.pattern])
    if rng.random() < 0.3:
        before.reverse()
    for detail in details:
        _add_detail(detail, garment, before, after, rng)
    words = " ".join([*before, _pick(_NOUNS[garment.category], rng)])
    ending = " with " + " and ".join(after) if after else ""
    return f"{_pick(_OPENINGS, rng)}{_with_article(words)}{ending}"


def _add_detail(detail: str, garment: Garment, before: list[str], after: list[str], rng: np.random.Generator) -> None:
    """Put one more attribute into the adjectives before the noun or the phrases after it."""
    if detail == "length":
        before.insert(0, _pick(_LENGTHS[garment.category][garment.length], rng))
    elif detail == "neckline":
        after.append(f"a {garment.neckline} {_pick(('neck', 'neckline'), rng)}")
    elif garment.sleeves == "sleeveless":
        before.insert(0, "sleeveless")
    elif rng.random() < 0.4:
        before.insert(0, f"{garment.sleeves}-sleeved")
    else:
        after.append(f"{garment.sleeves} sleeves")


def _change_caption(named: list[str], reference: Garment, target: Garment, rng: np.random.Generator) -> str:
    ordered = [named[k] for k in rng.permutation(len(named))]
    style = rng.random()
    if style < 0.5:
        phrases = [_pick(_predicates(name, reference, target), rng) for name in ordered]
        return _pick(_PREDICATE_FRAMES, rng).format(_pick(_JOINS, rng).join(phrases))
    modifiers = [_pick(_modifiers(name, reference, target), rng) for name in ordered]
    if style < 0.75 and len(ordered) == 2:  # "is red with long sleeves"
        return f"{_pick(_predicates(ordered[0], reference, target), rng)} {modifiers[1]}"
    return _pick(_MODIFIER_FRAMES, rng).format(" and ".join(modifiers))


def _predicates(name: str, reference: Garment, target: Garment) -> list[str]:
    """All ways to complete "the dress ..." with the new value of one attribute."""
    old, new = getattr(reference, name), getattr(target, name)
    if name == "length":
        words = [*_LENGTHS[target.category][new], _LENGTH_COMPARISONS[old, new]]
        return [f"is {word}" for word in words] + [f"has {_with_article(word)} cut" for word in words]
    comparisons = [f"has {_SLEEVE_COMPARISONS[old, new]}"] if _is_comparable(name, old, new) else []
    return _filled(_PREDICATES[name], old, new) + comparisons


def _modifiers(name: str, reference: Garment, target: Garment) -> list[str]:
    """All ways to complete "the same dress ..." with the new value of one attribute."""
    old, new = getattr(reference, name), getattr(target, name)
    if name == "length":
        words = [*_LENGTHS[target.category][new], _LENGTH_COMPARISONS[old, new]]
        return [f"in {_with_article(word)} cut" for word in words]
    comparisons = [f"with {_SLEEVE_COMPARISONS[old, new]}"] if _is_comparable(name, old, new) else []
    return _filled(_MODIFIERS[name], old, new) + comparisons


def _is_comparable(name: str, old: str, new: str) -> bool:
    return name == "sleeves" and (old, new) in _SLEEVE_COMPARISONS


def _filled(templates: dict[str, tuple[str, ...]], old: str, new: str) -> list[str]:
    return [text.format(new=new, old=old) for text in templates.get(new) or templates["any"]]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
