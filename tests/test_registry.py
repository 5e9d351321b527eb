from typing import Any, Literal

import pytest

from cliplab.errors import UserError
from cliplab.registry import build_part, check_part, closest, lookup


class Mixer:
    def __init__(
        self,
        width: int,
        hidden: int = 8,
        rate: float = 0.1,
        order: Literal["first", "last"] = "first",
        level: Literal[0, 1] = 0,
        bias: bool = True,
        label: str | None = None,
        sizes: tuple[int, ...] = (),
        extra: Any = None,
    ) -> None:
        self.given = (width, hidden, rate, order, level, bias, label, sizes, extra)


def scaled(value: float, factor: float) -> float:
    return value * factor


class Bare:
    """No options at all."""


PARTS = {"mixer": Mixer, "scaled": scaled, "bare": Bare}


def check(part: dict[Any, Any]) -> None:
    check_part("part", PARTS, part, given=("width", "value"))


def test_lookup_finds() -> None:
    assert lookup("part", PARTS, "mixer") is Mixer


@pytest.mark.parametrize("name", ["mixr", "Mixer"])
def test_lookup_names_the_kind_and_the_closest(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown part '{name}': did you mean 'mixer'.*bare, mixer, scaled"):
        lookup("part", PARTS, name)


@pytest.mark.parametrize("name", [None, 3, ["mixer"]])
def test_lookup_of_what_is_no_name_lists_the_names(name: object) -> None:
    with pytest.raises(UserError, match="(?i)there is: bare, mixer, scaled"):
        lookup("part", PARTS, name)


def test_closest_lists_few_names_and_only_hints_among_many() -> None:
    many = [f"item{number}" for number in range(31)]
    assert closest("item3x", many).startswith("did you mean 'item3'?")
    assert "item7" not in closest("item3x", many)
    assert closest("zzz", many) == "no similar name is known"
    assert closest("zzz", ["b", "a"]) == "there is: a, b"


@pytest.mark.parametrize(
    "part",
    [
        {"name": "mixer"},
        {"name": "mixer", "hidden": 4, "rate": 1, "order": "last", "level": 1, "bias": False, "label": "x"},
        {"name": "mixer", "label": None, "rate": 0.5, "sizes": [1, 2], "extra": {"any": "thing"}},
        {"name": "scaled", "factor": 2.0},
        {"name": "bare"},
    ],
)
def test_fitting_parts_pass(part: dict[str, Any]) -> None:
    check(part)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden", 4.0),
        ("hidden", True),
        ("hidden", "4"),
        ("hidden", None),
        ("rate", "high"),
        ("rate", True),
        ("order", "middle"),
        ("level", 2),
        ("level", True),
        ("bias", 1),
        ("label", 3),
        ("sizes", 3),
        ("sizes", [1, "2"]),
    ],
)
def test_a_wrong_type_names_part_option_and_value(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"part 'mixer': option '{option}' must be ") as error:
        check({"name": "mixer", option: value})
    assert str(error.value).endswith(f"got {value!r}")


def test_an_unknown_option_gets_the_closest_match() -> None:
    with pytest.raises(UserError, match="part 'mixer' has no option 'hiden': did you mean 'hidden'?"):
        check({"name": "mixer", "hiden": 4})


def test_a_part_without_options_says_so() -> None:
    with pytest.raises(UserError, match="part 'bare' has no option 'hidden': it has no options"):
        check({"name": "bare", "hidden": 4})


def test_what_the_builder_gives_is_no_option() -> None:
    with pytest.raises(UserError, match="part 'mixer' has no option 'width'"):
        check({"name": "mixer", "width": 4})


def test_a_required_option_is_named() -> None:
    with pytest.raises(UserError, match="part 'scaled' needs the option.* factor"):
        check({"name": "scaled"})


def test_a_colon_without_space_is_explained() -> None:
    with pytest.raises(UserError, match="space after the colon"):
        check({"name": "mixer", "hidden:4": None})


def test_a_name_without_space_is_explained() -> None:
    with pytest.raises(UserError, match="space after the colon"):
        check({"name:mixer": None})


@pytest.mark.parametrize("key", [1, True])
def test_an_option_that_is_no_word_is_a_user_error(key: object) -> None:
    """YAML reads `on: x` as True: x and `1: x` as a number."""
    with pytest.raises(UserError, match=f"no option '{key}'"):
        check({"name": "mixer", key: 4})


def test_build_gives_what_is_taken_and_leaves_the_rest() -> None:
    part = {"name": "mixer", "hidden": 3}
    built = build_part("part", PARTS, part, width=16, unused="x")
    assert built.given == (16, 3, 0.1, "first", 0, True, None, (), None)
    assert part == {"name": "mixer", "hidden": 3}
    assert build_part("part", PARTS, {"name": "scaled", "factor": 3.0}, value=2.0, width=1) == 6.0
    assert isinstance(build_part("part", PARTS, {"name": "bare"}, width=1), Bare)


def test_build_checks_first() -> None:
    with pytest.raises(UserError, match="option 'hidden'"):
        build_part("part", PARTS, {"name": "mixer", "hidden": "3"}, width=16)
