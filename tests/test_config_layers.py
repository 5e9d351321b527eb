from dataclasses import dataclass, field
from typing import Any

import pytest

from cliplab.config_layers import PART, check_keys, merge_layer, name_parts, set_parts, without_parts
from cliplab.errors import UserError


@dataclass
class Inner:
    size: int = 1
    head: dict[str, Any] | None = field(default=None, metadata=PART)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "a", "weight": 1}, metadata=PART)
    rates: dict[str, float] = field(default_factory=dict)


def test_keys_are_those_of_the_schema() -> None:
    check_keys({"inner": {"size": 2, "head": {"name": "x"}}, "loss": "b"}, Outer, "file")
    for layer, said in (
        ({"iner": {}}, r"file: unknown key 'iner': did you mean 'inner'"),
        ({"inner": {"sise": 2}}, r"file: unknown key 'inner.sise': did you mean 'inner.size'"),
        ({"inner": 3}, r"file: key 'inner' must be a mapping, got 3"),
        ({"loss": None}, r"file: key 'loss' must be a name or a mapping"),
    ):
        with pytest.raises(UserError, match=said):
            check_keys(layer, Outer, "file")
    check_keys({"inner": {"head": None}}, Outer, "file")


def test_a_named_part_starts_afresh_and_everything_else_is_merged() -> None:
    first = merge_layer({}, {"inner": {"size": 2}, "rates": {"x": 1.0}, "loss": {"weight": 3}}, Outer)
    assert first["loss"] == {"name": "a", "weight": 3}
    second = merge_layer(first, {"inner": {"head": "h"}, "rates": {"y": 2.0}, "loss": {"name": "b"}}, Outer)
    assert second == {"inner": {"size": 2, "head": {"name": "h"}}, "rates": {"x": 1.0, "y": 2.0}, "loss": {"name": "b"}}
    assert merge_layer(second, {"inner": {"head": None}}, Outer)["inner"]["head"] is None


def test_parts_are_named_left_out_and_put_in() -> None:
    named = name_parts({"inner": {"head": "h", "size": 2}, "loss": "b"}, Outer)
    assert named == {"inner": {"head": {"name": "h"}, "size": 2}, "loss": {"name": "b"}}
    assert without_parts(named, Outer) == {"inner": {"size": 2}}
    section = Outer()
    set_parts(section, named)
    assert section.loss == {"name": "b"} and section.inner.head == {"name": "h"} and section.inner.size == 1
