import pytest
import torch
from torch import Tensor

from cliplab.evaluation.audit import SHARES, modality_audit


def ranks(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BY_HAND = {  # eight queries
    "": {"dress": ranks(10, 1, 3, 11, 50, 9, 10.5, 2)},
    "image_only": {"dress": ranks(11, 10, 1, 2, 90, 60, 12, 40)},
    "text_only": {"dress": ranks(5, 99, 7, 30, 51, 11, 11, 10)},
}


def test_a_case_worked_by_hand() -> None:
    """Query by query at 10, with the composer's rank first.

    10/11/5: text. 1/10/99: image. 3/1/7: both. 11/2/30: image, lost. 50/90/51: none. 9/60/11: needs both.
    10.5/12/11: none (10.5 is the mean rank of a tie). 2/40/10: text.
    """
    audit = modality_audit(BY_HAND, (10,))
    assert audit["dress"]["R@10"] == {
        "image_only": 100 * 3 / 8,
        "text_only": 100 * 3 / 8,
        "either": 100 * 5 / 8,
        "composer_only": 100 * 1 / 8,
        "lost": 100 * 1 / 8,
        "unsolved": 100 * 2 / 8,
    }
    assert audit["mean"] == audit["dress"]


def test_at_one_and_at_all() -> None:
    audit = modality_audit(BY_HAND, (1, 100))["dress"]
    assert audit["R@1"] == dict(zip(SHARES, (12.5, 0.0, 12.5, 12.5, 12.5, 75.0), strict=True))
    assert audit["R@100"] == dict(zip(SHARES, (100.0, 100.0, 100.0, 0.0, 0.0, 0.0), strict=True))


def test_the_mean_is_over_benchmarks_whatever_their_sizes() -> None:
    shirt = {"": ranks(1, 1), "image_only": ranks(20, 20), "text_only": ranks(20, 1)}
    both = {label: of | {"shirt": shirt[label]} for label, of in BY_HAND.items()}
    audit = modality_audit(both, (10,))
    assert list(audit) == ["dress", "shirt", "mean"]
    assert audit["shirt"]["R@10"]["composer_only"] == 50.0
    assert audit["mean"]["R@10"]["composer_only"] == (12.5 + 50) / 2
    assert audit["mean"]["R@10"]["unsolved"] == (25 + 0) / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_shares_add_up(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = {label: {"x": torch.randint(1, 40, (77,), generator=generator).double()} for label in BY_HAND}
    for k in (1, 10, 25):
        shares = modality_audit(drawn, (k,))["x"][f"R@{k}"]
        assert list(shares) == list(SHARES)
        assert shares["either"] + shares["composer_only"] + shares["unsolved"] == pytest.approx(100)
        recall = 100 * (drawn[""]["x"] <= k).double().mean().item()
        assert shares["either"] + shares["composer_only"] - shares["lost"] == pytest.approx(recall)
        overlap = shares["image_only"] + shares["text_only"] - shares["either"]
        expected = (drawn["image_only"]["x"] <= k) & (drawn["text_only"]["x"] <= k)
        assert overlap == pytest.approx(100 * expected.double().mean().item())


def test_without_baselines_there_is_no_audit() -> None:
    assert modality_audit({"": {"t2i": ranks(1, 2)}}, (1,)) == {}
