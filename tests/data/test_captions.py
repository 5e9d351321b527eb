import pytest

from cliplab.data.captions import EVAL_JOINS, precaption, strip_caption, training_samples
from cliplab.data.templates import CLASS_WORDINGS

PLAIN = (" is Blue, has NO collar. ", "Shorter?")
EMPTY = ("", "is red.")
# join -> texts of PLAIN, texts of EMPTY; the category is dress
BY_HAND = {
    "and_cap": (["Is blue, has no collar and Shorter"], [" and is red"]),
    "both_orders_mean": (
        ["is Blue, has NO collar and Shorter", "Shorter and is Blue, has NO collar"],
        [" and is red", "is red and "],
    ),
    "star_reversed": (
        ["a photo of * , Shorter? and  is Blue, has NO collar. "],
        ["a photo of * , is red. and "],
    ),
    "and_precaption": (["is blue, has no collar and shorter?"], ["and is red"]),
    "comma_and": ([" is Blue, has NO collar. , and Shorter?"], [", and is red."]),
    "both_orders_separate": (
        [" is Blue, has NO collar.  and Shorter?", "Shorter? and  is Blue, has NO collar. "],
        [" and is red.", "is red. and "],
    ),
    "each_caption": ([" is Blue, has NO collar. ", "Shorter?"], ["is red."]),
    "caption": ([" is Blue, has NO collar. "], [""]),
    "precaption": (["is blue, has no collar"], [""]),
    "shared_concept": (  # of CIRCO, whose second caption is what both pictures share
        ["Find a picture that also Shorter?, but  is Blue, has NO collar. ."],
        ["Find a picture that also is red., but ."],
    ),
    "category_it": (["dress  is blue, has no collar.  and it shorter?"], ["dress  and it is red."]),
}


@pytest.mark.parametrize("join", sorted(BY_HAND.keys() | (EVAL_JOINS.keys() - CLASS_WORDINGS.keys())))
def test_each_evaluation_join_as_worked_by_hand(join: str) -> None:
    plain, empty = BY_HAND[join]
    assert EVAL_JOINS[join](PLAIN, "dress") == plain
    assert EVAL_JOINS[join](EMPTY, "dress") == empty


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_only_each_caption_drops_empty_captions(blank: str) -> None:
    dropping = {join for join, texts in EVAL_JOINS.items() if not texts((blank, blank), "dress")}
    assert dropping == {"each_caption"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (" is Red., ", "is Red"),
        ("?.,a. b?,.", "a. b"),
        ("it's a-line!", "it's a-line!"),
        ("tab\t", "tab\t"),
        (".?, ", ""),
        ("", ""),
    ],
)
def test_strip_caption_takes_only_outer_marks(given: str, expected: str) -> None:
    assert strip_caption(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('Has (no) "collar"; it\'s #1: a*b ~ c!', "has no collar it's 1 a b c"),
        ("  two\t spaces \n", "two spaces"),
        ("a-line, long?", "a-line, long?"),
        (" ".join(["Word"] * 31), " ".join(["word"] * 30)),
        ("", ""),
    ],
)
def test_precaption_is_the_cleaning_of_blip(given: str, expected: str) -> None:
    assert precaption(given) == expected


def test_precaption_cuts_where_it_is_told() -> None:
    assert precaption("a b c", max_words=2) == "a b"


# Training samples: a list per sample of the texts of which one is drawn


def test_random4_draws_from_both_orders_and_each_caption() -> None:
    assert training_samples("random4_cap", PLAIN, "dress") == [
        [
            "Is blue, has no collar and Shorter",
            "Shorter and is Blue, has NO collar",
            "Is blue, has no collar",
            "Shorter",
        ]
    ]
    assert training_samples("random4_cap", EMPTY, "dress") == [[" and is red", "Is red and ", "", "Is red"]]


def test_random1_draws_from_all_captions_as_they_are() -> None:
    assert training_samples("random1", ("A b.", "", "c"), "") == [["A b.", "", "c"]]


@pytest.mark.parametrize(
    ("join", "samples"),
    [
        ("and_precaption", [["is blue, has no collar and shorter?"]]),
        ("both_orders_separate", [[text] for text in BY_HAND["both_orders_separate"][0]]),
        ("each_caption", [[" is Blue, has NO collar. "], ["Shorter?"]]),
        ("category_it", [["dress  is blue, has no collar.  and it shorter?"]]),
    ],
)
def test_other_training_joins_are_the_evaluation_join_one_sample_each(join: str, samples: list[list[str]]) -> None:
    assert training_samples(join, PLAIN, "dress") == samples


def test_training_on_each_caption_has_no_sample_of_an_empty_one() -> None:
    assert training_samples("each_caption", EMPTY, "dress") == [["is red."]]
    assert training_samples("each_caption", ("", " "), "dress") == []
