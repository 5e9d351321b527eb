"""The harness of benchmarks/; what it measures is not tested here."""

import pytest

from benchmarks.__main__ import HEADER, SCRIPTS, markdown, with_table
from benchmarks.measure import Row, Timings, interleave

ROW = Row("a question", 20.0, 10.0, "images/s", 2.0, "a peer", 1.5)


def test_a_ratio_is_the_median_over_rounds_of_both_sides():
    timings = Timings({"ours": [1.0, 2.0, 10.0], "theirs": [2.0, 6.0, 10.0]})
    assert timings.ratio("theirs", "ours") == 2.0, "of 2, 3 and 1"
    row = timings.row("a question", "ours", "theirs", 12, "images/s", 1.5)
    assert (row.ours, row.other, row.ratio) == (6.0, 2.0, 2.0)


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(seconds) for seconds in timings.seconds.values()] == [2, 2]


@pytest.mark.parametrize(("ratio", "shown"), [(1.6, "| 1.60 |"), (1.4, "| **1.40** |")])
def test_a_ratio_that_is_missed_is_bold(ratio: float, shown: str):
    assert shown in markdown([Row("a question", 1, 1, "s", ratio, "a peer", 1.5)])


def test_a_table_is_replaced_and_those_of_other_machines_stay():
    first, second = SCRIPTS[:2]
    text = with_table(HEADER, "machine A", second, [ROW])
    text = with_table(text, "machine B", first, [ROW])
    text = with_table(text, "machine A", first, [ROW])
    again = with_table(text, "machine A", second, [Row("another", 1, 1, "s", 1, "a peer")])
    assert again.startswith(HEADER) and again.count("## machine") == 2
    a, b = again.split("## machine B")
    assert a.index(f"### {first}") < a.index(f"### {second}") and "another" in a and f"### {first}" in b
    assert with_table(again, "machine A", second, [Row("another", 1, 1, "s", 1, "a peer")]) == again
