from dataclasses import replace

import pytest

from cliplab.benchmark import PROTOCOLS
from cliplab.errors import UserError
from cliplab.evaluation.evaluator import Evaluator
from cliplab.evaluation.truth import check_submittable, excluded_rows, truths_of
from tests.evaluation.test_evaluator import REFERENCES, RELEVANT, make_benchmark, make_composed


def test_the_reference_is_kept_out_unless_it_is_a_target() -> None:
    kept = make_benchmark(PROTOCOLS["clip4cir"])
    assert excluded_rows(kept) == [[]] * 5
    out = make_benchmark(replace(PROTOCOLS["clip4cir"], exclude_reference=True))
    assert excluded_rows(out) == [[] if REFERENCES[q] in (-1, *out.positives[q]) else [REFERENCES[q]] for q in range(5)]


def test_what_is_ranked_is_what_the_protocol_reports() -> None:
    plain, composed = make_benchmark(PROTOCOLS["clip4cir"]), make_composed(soft=True)
    assert list(truths_of(plain, backward=False)) == ["best"]
    found = truths_of(composed, backward=False)
    assert list(found) == ["best", "each", "graded"]
    assert found["each"].positives == [
        sorted(set(rows) - set(out)) for rows, out in zip(RELEVANT, excluded_rows(composed), strict=True)
    ]


def test_a_subset_that_is_too_small_can_t_be_submitted() -> None:
    subsets = [[0, 1, 2], [3, 4], [5], [6, 7, 8], [0, 2, 4]]
    with pytest.raises(UserError, match="subset of query 'query 1' and of 1 more are 2 images, a submission names 3"):
        check_submittable(replace(make_composed(), subsets=subsets))
    check_submittable(replace(make_composed(), subsets=[[0, 1, 2]] * 5))


@pytest.mark.parametrize("field", ["positives", "relevant", "subsets", "gains"])
def test_an_empty_truth_is_an_error_that_names_the_query(field: str) -> None:
    benchmark = make_composed(soft=True)
    rows = list(getattr(benchmark, field))
    rows[3] = type(rows[3])()
    with pytest.raises(UserError, match=f"benchmark 'dress': no {field} for query 'query 3'; leave"):
        Evaluator(replace(benchmark, **{field: rows}))
    rows[4] = type(rows[4])()
    with pytest.raises(UserError, match=f"no {field} for query 'query 3' and 1 more"):
        Evaluator(replace(benchmark, **{field: rows}))


def test_an_empty_truth_of_the_transpose_is_named_too() -> None:
    benchmark = make_composed()
    assert benchmark.transpose is not None
    other = replace(benchmark.transpose, positives=[*benchmark.transpose.positives[:-1], []])
    with pytest.raises(UserError, match="benchmark 'i2t': no positives for query 'picture 8'"):
        Evaluator(replace(benchmark, transpose=other))


def test_what_the_protocol_asks_and_the_benchmark_lacks() -> None:
    with pytest.raises(UserError, match="'dress' has no subsets, but its protocol has subset_at"):
        Evaluator(replace(make_composed(), subsets=None))
    with pytest.raises(UserError, match="no query carries the aspect 'negation'"):
        Evaluator(replace(make_composed(), groups={"addition": [1], "negation": []}))
    only_reference = [[5], *RELEVANT[1:]]  # query 0 asks with row 5, which its protocol keeps out
    with pytest.raises(UserError, match="no relevant for query 'query 0'"):
        Evaluator(replace(make_composed(), relevant=only_reference))
