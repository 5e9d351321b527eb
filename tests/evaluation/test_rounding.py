import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.evaluation import counting, nearest, rounding
from cliplab.evaluation.counting import FirstLook, Scores, ScoreTable
from cliplab.evaluation.nearest import top_k
from cliplab.evaluation.ranking import Truth, rank_truths
from cliplab.evaluation.rounding import RoundingErrors, rounds_products
from cliplab.evaluation.scoring import CosineScorer
from tests.evaluation.plain import loop, unit


def as_bf16(queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
    """A product of rounded operands, on any machine."""
    return torch.mm(queries.bfloat16().float(), gallery.bfloat16().float().T, out=out)


class Rounded(CosineScorer):
    """Multiplies rounded operands whenever torch is told that it may."""

    looks = 0

    def block(self, queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
        if torch.get_float32_matmul_precision() == "highest":
            return super().block(queries, gallery, out)
        Rounded.looks += 1
        with rounding.matmul_precision("highest"):
            return as_bf16(queries, gallery, out)


@pytest.fixture(autouse=True)
def can_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "rounds_products", lambda device: True)
    monkeypatch.setattr(Rounded, "looks", 0)


@pytest.mark.parametrize("width", [4, 64, 512, 1024])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_the_band_holds_and_is_no_wider_than_it_must(width: int, scale: float) -> None:
    torch.manual_seed(width)
    queries, gallery = scale * unit(50, width), unit(80, width)
    gallery[0] = queries[0] / scale
    everything = slice(0, 80)
    band = RoundingErrors(queries, gallery).band(slice(0, 50), everything)
    error = (as_bf16(queries, gallery).double() - queries.double() @ gallery.double().T).abs().max()
    assert error <= band < scale * 2**-7


def test_the_bound_is_reached_by_the_worst_case() -> None:
    """All errors of one sign, halfway between two bf16 numbers: a narrower band would be wrong."""
    value = torch.full((1, 64), (1 + 2**-8) / 8)
    value /= value.norm()
    value = value.bfloat16().float() * (1 + 2**-8)  # on the grid, then half a step up
    band = RoundingErrors(value, value).band(slice(0, 1), slice(0, 1))
    error = float((as_bf16(value, value) - value @ value.T).abs())
    assert 0.95 * band < error <= band


def test_what_is_not_finite_does_not_widen_the_band() -> None:
    rows = unit(5, 8)
    alone = RoundingErrors(rows[:3], rows[:3]).band(slice(0, 3), slice(0, 3))
    rows[3], rows[4] = torch.nan, torch.inf
    assert RoundingErrors(rows, rows).band(slice(0, 5), slice(0, 5)) == alone


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("blocks", [(16, 32), (300, 500)])
def test_ranks_are_a_loops(noise: float, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FirstLook, "FEW", 1.0)  # never give up
    torch.manual_seed(0)
    gallery = unit(60, 32)[torch.randint(0, 60, (90,))]
    queries = F.normalize(gallery[:40] + noise * torch.randn(40, 32) / 32**0.5, dim=1)
    positives = [[q] for q in range(40)]
    back = [[g % 40] for g in range(90)]
    truths = [Truth(positives), Truth(back, backward=True)]
    found = rank_truths(queries, gallery, truths, Rounded(), blocks)
    assert Rounded.looks > 0
    there, back_again = loop(queries, gallery, positives, [[]] * 40), loop(gallery, queries, back, [[]] * 90)
    for each, expected in zip(found, (there, back_again), strict=True):
        assert (each.pessimistic.tolist(), each.ties.tolist()) == expected


def test_where_many_are_near_it_gives_up_for_a_while() -> None:
    torch.manual_seed(0)
    table = ScoreTable(unit(64, 16), unit(256, 16), Rounded())
    rank_truths(table.queries, table.gallery, [Truth([[q] for q in range(64)])], table.scorer, (8, 16))
    assert Rounded.looks == 2, "at the first of 128 blocks, and after 64 others"


def test_a_rounded_block_says_how_far_it_can_be_trusted() -> None:
    torch.manual_seed(0)
    table = ScoreTable(unit(6, 64), unit(9, 64), Rounded())
    scores = Scores(table, (6, 9))
    exact = table.queries.double() @ table.gallery.double().T
    for rounded in (False, True):
        block = scores.block(slice(0, 6), slice(0, 9), rounded)
        assert (block.scores_qg - exact).abs().max() <= block.band
    assert torch.get_float32_matmul_precision() == "highest"


def test_this_machine_is_asked_once_and_left_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    assert rounds_products("cpu") in (True, False)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("noise", "k"), [(3e-2, 1), (3e-2, 5), (1e-4, 1), (1e-4, 5)])
def test_the_nearest_of_many_that_look_alike(noise: float, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded scores (3e-2) and fp32 scores as well (1e-4) put them in a wrong order: exact ones decide."""
    monkeypatch.setattr(nearest, "SPARE", 2)
    torch.manual_seed(0)
    queries = unit(20, 64)
    for query in queries[:, None]:
        gallery = F.normalize(query + noise * torch.randn(300, 64), dim=1)
        exact = CosineScorer().pairs(query.expand(300, 64), gallery)
        assert torch.equal(
            top_k(query, gallery, k, scorer=Rounded())[0], exact.argsort(descending=True, stable=True)[:k]
        )
