import pytest
import torch

from cliplab.evaluation.scoring import CosineScorer, JointScorer
from cliplab.models.composers import Artemis
from tests.evaluation.plain import dot, unit


@pytest.mark.parametrize("width", [1, 5, 8, 512, 768])
def test_exact_pairs_do_not_depend_on_their_number(width: int) -> None:
    torch.manual_seed(0)
    queries, gallery = unit(50, width), unit(50, width)
    scores = CosineScorer().pairs(queries, gallery)
    assert scores.dtype == torch.float64
    alone = [CosineScorer().pairs(queries[n : n + 1], gallery[n : n + 1]).item() for n in range(50)]
    assert scores.tolist() == alone
    assert alone == pytest.approx([dot(q, y) for q, y in zip(queries, gallery, strict=True)], abs=1e-15)


def test_blocks_are_products(artemis: Artemis) -> None:
    queries, gallery = unit(5, 8), unit(7, 8)
    torch.testing.assert_close(CosineScorer().block(queries, gallery), torch.einsum("qd,gd->qg", queries, gallery))
    pairs = artemis.compose(unit(5, 8), unit(5, 8)).detach()
    torch.testing.assert_close(JointScorer(artemis).block(pairs, gallery), artemis.score(pairs, gallery))


@pytest.fixture
def artemis() -> Artemis:
    torch.manual_seed(0)
    artemis = Artemis(8)
    with torch.no_grad():
        for parameter in artemis.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return artemis


def test_pairs_are_scored_in_float64_by_a_copy(artemis: Artemis) -> None:
    artemis.train()
    queries, gallery = artemis.compose(unit(5, 8), unit(5, 8)).detach(), unit(5, 8)
    scores = JointScorer(artemis).pairs(queries, gallery)
    expected = Artemis(8).double()
    expected.load_state_dict(artemis.state_dict())
    table = expected.score(queries.double(), gallery.double())
    torch.testing.assert_close(scores, table.diagonal().detach(), rtol=1e-13, atol=1e-13)
    assert artemis.training and artemis.transform.weight.dtype == torch.float32, "the model itself is untouched"
