"""How the captions of a record become query text. Definitions: the captions table of each method's released code.

c0, c1 are the two captions of a FashionIQ record. Evaluation joins return the wordings of a record (one or several);
training joins return samples, each a list of texts of which one is drawn at random per epoch.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

from cliplab.data.templates import CLASS_WORDINGS

Captions = Sequence[str]


def strip_caption(caption: str) -> str:
    """CLIP4Cir's cleaning: outer spaces, full stops, question marks and commas."""
    return caption.strip(".?, ")


def precaption(caption: str, max_words: int = 30) -> str:
    """BLIP's cleaning: lower case, without `.!"()*#:;~`, single spaces, at most `max_words` words."""
    cleaned = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(cleaned.split()[:max_words])


def _joined_cap(first: str, second: str) -> str:
    return f"{strip_caption(first).capitalize()} and {strip_caption(second)}"


def _and_cap(captions: Captions, category: str) -> list[str]:
    return [_joined_cap(captions[0], captions[1])]


def _both_orders_mean(captions: Captions, category: str) -> list[str]:
    first, second = strip_caption(captions[0]), strip_caption(captions[1])
    return [f"{first} and {second}", f"{second} and {first}"]


def _star_reversed(captions: Captions, category: str) -> list[str]:
    return [f"a photo of * , {captions[1]} and {captions[0]}"]


def _and_precaption(captions: Captions, category: str) -> list[str]:
    return [precaption(f"{captions[0]} and {captions[1]}")]


def _comma_and(captions: Captions, category: str) -> list[str]:
    return [f"{captions[0]}, and {captions[1]}"]


def _both_orders_separate(captions: Captions, category: str) -> list[str]:
    # ARTEMIS joins with a word `<and>` of its own vocabulary; CLIP's vocabulary has the word "and" for it.
    return [f"{captions[0]} and {captions[1]}", f"{captions[1]} and {captions[0]}"]


def _each_caption(captions: Captions, category: str) -> list[str]:
    return [caption for caption in captions if caption.strip()]  # VAL drops the empty ones


def _category_it(captions: Captions, category: str) -> list[str]:
    return [f"{category} {captions[0]} and it {captions[1]}".lower()]


def _class_wordings(captions: Captions, category: str, templates: Sequence[str]) -> list[str]:
    return [template.format(captions[0]) for template in templates]


def _caption(captions: Captions, category: str) -> list[str]:
    return [captions[0]]


def _precaption(captions: Captions, category: str) -> list[str]:
    return [precaption(captions[0])]


def _shared_concept(captions: Captions, category: str) -> list[str]:
    """BGE-VL's sentence on CIRCO; the second caption is what both pictures share."""
    return [f"Find a picture that also {captions[1]}, but {captions[0]}."]


EVAL_JOINS: dict[str, Callable[[Captions, str], list[str]]] = {
    "and_cap": _and_cap,
    "both_orders_mean": _both_orders_mean,
    "star_reversed": _star_reversed,
    "and_precaption": _and_precaption,
    "comma_and": _comma_and,
    "both_orders_separate": _both_orders_separate,
    "each_caption": _each_caption,
    "category_it": _category_it,
    "caption": _caption,
    "precaption": _precaption,
    "shared_concept": _shared_concept,
    **{join: partial(_class_wordings, templates=templates) for join, templates in CLASS_WORDINGS.items()},
}


def _random4_cap(captions: Captions, category: str) -> list[list[str]]:
    c0, c1 = captions[0], captions[1]
    singles = [strip_caption(caption).capitalize() for caption in (c0, c1)]
    return [[_joined_cap(c0, c1), _joined_cap(c1, c0), *singles]]


def _one_sample_each(captions: Captions, category: str, join: str) -> list[list[str]]:
    return [[text] for text in EVAL_JOINS[join](captions, category)]


def training_samples(join: str, captions: Captions, category: str) -> list[list[str]]:
    """The training samples of a record: per sample the texts of which one is drawn. Keys: Protocol.train_join."""
    if join == "random4_cap":
        return _random4_cap(captions, category)
    if join == "random1":
        return [list(captions)]
    return _one_sample_each(captions, category, join)
