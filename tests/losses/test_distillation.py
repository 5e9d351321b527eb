import pytest
import torch
from open_clip.loss import DistillClipLoss

from cliplab.losses.distillation import distillation
from cliplab.losses.info_nce import info_nce
from tests.losses.features import assert_same, features, number

B, D, WIDE = 6, 5, 8


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_values_and_gradients_are_open_clips(weight: float) -> None:
    query, target, teacher_query, teacher_target = features((B, D), (B, D), (B, WIDE), (B, WIDE))
    scale, teacher = number(9.0), {"teacher_query": teacher_query, "teacher_target": teacher_target}
    found = distillation(query, target, scale, **teacher, teacher_scale=number(5.0), weight=weight)
    taught = (teacher_query.detach(), teacher_target.detach(), number(5.0).detach())
    contrastive, distilled = DistillClipLoss()(query, target, scale, *taught)
    assert_same(found, contrastive + weight * distilled, (query, target, scale))


def test_the_plain_formula() -> None:
    query, target, teacher_query, teacher_target = features((B, D), (B, D), (B, WIDE), (B, WIDE))
    scale, teacher_scale = number(9.0), number(5.0)
    student, teacher = scale * query @ target.T, teacher_scale * teacher_query @ teacher_target.T
    total = info_nce(query, target, scale)
    for s, t in ((student, teacher), (student.T, teacher.T)):
        for i in range(B):
            p, q = torch.exp(t[i]) / torch.exp(t[i]).sum(), torch.exp(s[i]) / torch.exp(s[i]).sum()
            total = total - sum(p[j] * torch.log(q[j]) for j in range(B)) / (2 * B)
    given = {"teacher_query": teacher_query, "teacher_target": teacher_target, "teacher_scale": teacher_scale}
    assert_same(distillation(query, target, scale, **given), total, (query, target, scale))


def test_a_joint_score_of_the_student_and_equal_targets() -> None:
    query, target, teacher_query, teacher_target = features((B, D), (B, D), (B, WIDE), (B, WIDE))
    given = {"teacher_query": teacher_query, "teacher_target": teacher_target, "teacher_scale": number(5.0)}
    ids = torch.tensor([3, 3, 1, 2, 1, 0])

    def score(q: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (q @ y.T) ** 2

    found = distillation(query, target, number(9.0), score, target_id=ids, **given)
    own = info_nce(query, target, number(9.0), score, target_id=ids)
    student, teacher = 9 * score(query, target), 5 * teacher_query @ teacher_target.T
    rows, columns = (-(t.softmax(1) * s.log_softmax(1)).sum(1) for t, s in ((teacher, student), (teacher.T, student.T)))
    torch.testing.assert_close(found, own + (rows.mean() + columns.mean()) / 2)


def test_half_precision_is_computed_in_fp32() -> None:
    given = features((B, D), (B, D), (B, WIDE), (B, WIDE), dtype=torch.bfloat16)
    names = ("teacher_query", "teacher_target")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taught = dict(zip(names, given[2:], strict=True))
        loss = distillation(given[0], given[1], number(9.0), **taught, teacher_scale=number(5.0, torch.bfloat16))
    exact = [each.detach().double() for each in given]
    expected = DistillClipLoss()(exact[0], exact[1], number(9.0), exact[2], exact[3], number(5.0))
    assert loss.dtype in (torch.float32, torch.float64) and loss.item() == pytest.approx(sum(expected).item(), rel=1e-4)
