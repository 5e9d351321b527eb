"""How far products of operands rounded to bf16 are from the true ones; rounded products are several times faster."""

import functools

import torch
from torch import Tensor

from cliplab.evaluation.scoring import summation_error
from cliplab.precision import exact_fp32, matmul_precision


class RoundingErrors:
    """Bounds |q.g - q'.g'| for all rows of two blocks, q' and g' being q and g rounded to bf16.

    |q.g - q'.g'| = |(q - q').g + q'.(g - g')| <= |q - q'||g| + |q'||g - g'|, by Cauchy and Schwarz; for unit vectors
    about 0.0017.
    """

    def __init__(self, queries: Tensor, gallery: Tensor) -> None:
        self.tables = {"queries": queries, "gallery": gallery}
        self._known: dict[tuple[str, int, int], tuple[float, float]] = {}

    def band(self, queries: slice, gallery: slice) -> float:
        """Of a block."""
        (query_error, query_norm), (gallery_error, gallery_norm) = (
            self._of("queries", queries),
            self._of("gallery", gallery),
        )
        rounded = query_error * gallery_norm + (query_norm + query_error) * gallery_error
        width = self.tables["gallery"].shape[-1]
        return rounded + summation_error(width) * (query_norm + query_error) * (gallery_norm + gallery_error)

    def _of(self, table: str, rows: slice) -> tuple[float, float]:
        """The largest |x - x'| and |x|; a row that is not finite has scores that are none, and does not count."""
        key = (table, rows.start, rows.stop)
        if key not in self._known:
            values = self.tables[table][rows].float()
            error = (values - values.bfloat16().float()).norm(dim=-1)
            sizes = torch.stack([error, values.norm(dim=-1)]).nan_to_num(0.0, 0.0)
            largest, norm = sizes.amax(1).tolist()
            self._known[key] = largest, norm
        return self._known[key]


@functools.cache
def rounds_products(device: str) -> bool:
    """Whether fp32 products on this device can use rounded operands, with errors within the bounds above."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    left, right = (torch.nn.functional.normalize(each, dim=1) for each in (left, right))
    with exact_fp32(left.device):
        plain = left @ right.T
        with matmul_precision("medium"):
            rounded = left @ right.T
    error = float((rounded - plain).abs().max())
    everything = slice(0, 256)
    return summation_error(256) < error <= RoundingErrors(left, right).band(everything, everything)
