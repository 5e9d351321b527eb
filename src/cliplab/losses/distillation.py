"""Distillation from a teacher CLIP, as open_clip's DistillClipLoss has it."""

import torch
from torch import Tensor

from cliplab.losses.gather import gather
from cliplab.losses.info_nce import Score, cosine_scores, info_nce
from cliplab.precision import at_least_fp32, exact_fp32


def distillation(
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    score: Score = cosine_scores,
    *,
    teacher_query: Tensor,
    teacher_target: Tensor,
    teacher_scale: Tensor,
    weight: float = 1.0,
    target_id: Tensor | None = None,
) -> Tensor:
    """The symmetric InfoNCE of the student plus `weight` times its cross-entropy to the teacher -> scalar.

    L = info_nce + weight / 2 * (H(T, S) + H(T^T, S^T)), H(T, S) = -1/B sum_i sum_j softmax_j(T_i) log softmax_j(S_i),
    with S = scale * score(Q, Y) of the student and T = teacher_scale * <Q', Y'> of the teacher.
    query [B, ...], target [B, D]; teacher_query, teacher_target [B, D'] of unit length, without gradients. Over the
    batch of all processes, computed in fp32 at least. target_id as in `info_nce`, for the student's own part alone.
    """
    own = info_nce(query, target, scale, score, target_id=target_id)
    query, target = gather(at_least_fp32(query)), gather(at_least_fp32(target))
    teacher_query, teacher_target = gather(at_least_fp32(teacher_query)), gather(at_least_fp32(teacher_target))
    with exact_fp32(query.device):
        student = at_least_fp32(scale) * score(query, target)
        teacher = at_least_fp32(teacher_scale) * cosine_scores(teacher_query, teacher_target)
        both = [_cross_entropy(*logits) for logits in ((teacher, student), (teacher.T, student.T))]
        return own + weight * torch.stack(both).mean()


def _cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Logits [B, B] -> the mean over rows of -sum_j softmax(teacher)_j log softmax(student)_j."""
    return -(teacher.softmax(dim=1) * student.log_softmax(dim=1)).sum(dim=1).mean()
