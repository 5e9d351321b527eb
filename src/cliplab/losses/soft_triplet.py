"""TIRG's soft triplet loss (Vo et al., CVPR 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.errors import UserError
from cliplab.losses.gather import gather
from cliplab.precision import at_least_fp32, exact_fp32


def soft_triplet(
    query: Tensor, target: Tensor, scale: Tensor, *, negatives_drawn: int = 3, target_id: Tensor | None = None
) -> Tensor:
    """2B anchors, queries and targets, each nearer to its partner than to some of other pairs -> scalar.

    L = mean log(1 + exp(||f_a - f_p||^2 - ||f_a - f_n||^2)), f = sqrt(scale) times the unit vectors: scale is the
    square of TIRG's (initially 4: fixed_scale 16), so that it multiplies cosines as in every other loss.
    query, target [B, D] of unit length. The negatives of an anchor, `negatives_drawn` of them, are drawn without
    repetition from the queries and targets of other pairs, of all processes; each process draws its own. target_id [B]
    int64: what has the anchor's id is no negative. Computed in fp32 at least. Raises UserError where no negative is.
    """
    query, target = gather(at_least_fp32(query)), gather(at_least_fp32(target))
    ids = torch.arange(len(query), device=query.device) if target_id is None else gather(target_id)
    if negatives_drawn < 1 or len(query) < 2:
        raise UserError(
            "loss 'soft_triplet' needs negatives_drawn of 1 or more and a batch of 2 or more (data.batch_size), got "
            f"{negatives_drawn}, {len(query)}"
        )
    with exact_fp32(query.device):
        features = torch.cat([query, target])
        negatives, are_negatives = draw_negatives(torch.cat([ids, ids]), negatives_drawn)
        to_partner = (features * torch.cat([target, query])).sum(-1)[:, None]  # [2B, 1]
        to_negatives = torch.einsum("ad,and->an", features, features[negatives])
        # Between vectors of length sqrt(scale) the squared distance is 2 scale (1 - cosine).
        losses = F.softplus(2 * at_least_fp32(scale) * (to_negatives - to_partner))
        # Mean over the negatives that there are; a batch of one id alone has none, and nothing to learn.
        return torch.where(are_negatives, losses, 0).sum() / are_negatives.sum().clamp_min(1)


def draw_negatives(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [A] -> places [A, n] of random others, no two the same, and whether they are negatives, bool [A, n].

    n is `count`, or A - 1 if that is less; where fewer have another id, the rest is marked.
    """
    is_negative = ids[:, None] != ids[None, :]
    keys = torch.rand(is_negative.shape, device=ids.device).masked_fill(~is_negative, -1)
    drawn = keys.topk(min(count, len(ids) - 1), dim=1)
    return drawn.indices, drawn.values >= 0
