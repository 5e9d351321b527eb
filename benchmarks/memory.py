"""Peak memory of a contrastive step in chunks beside one pass: ViT-B-32, batch 256, chunks of 16.

python -m benchmarks.memory [BATCH CHUNK]
"""

import json
import sys

import torch

from benchmarks.measure import PeakMemory, Row, in_new_process, show
from cliplab.losses import LOSSES
from cliplab.models.clip import build_clip
from cliplab.models.composed import ComposedRetriever
from cliplab.sources import find_source


def step(batch: int, chunk: int | None) -> dict[str, float]:
    """MB above what there is before the step, and the loss and the norm of the gradients as a check."""
    torch.manual_seed(0)
    source = find_source("ViT-B-32", None)
    clip = build_clip(source.architecture)
    model = ComposedRetriever(clip, None, source.preprocess.mean, source.preprocess.std)
    model.set_chunk_size(chunk)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the optimiser's memory is not what is asked here
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    text = torch.randint(1, 49_000, (batch, 77))
    text[:, 18:] = 0
    text[:, 17] = 49_407
    with PeakMemory() as peak:
        query, target = model.encode_query({"text": text}), model.encode_target({"image": images})
        loss = LOSSES["info_nce"](query, target, model.scale)
        loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"above": peak.above, "loss": loss.item(), "norm": norm.item()}


def main(arguments: list[str]) -> None:
    """Both in processes of their own."""
    if arguments[:1] == ["step"]:
        batch, chunk = map(int, arguments[1:])
        print(json.dumps(step(batch, chunk or None)))
        return
    batch, chunk = map(int, arguments or (256, 16))
    chunked, whole = (in_new_process("benchmarks.memory", "step", str(batch), str(size)) for size in (chunk, 0))
    differences = [abs(chunked[key] / whole[key] - 1) for key in ("loss", "norm")]
    notes = f"relative difference of the loss {differences[0]:.1e}, of the gradients' norm {differences[1]:.1e}"
    question = f"peak memory above the weights, ViT-B-32, batch {batch} in chunks of {chunk}"
    ratio = whole["above"] / chunked["above"]
    show([Row(question, chunked["above"], whole["above"], "MB", ratio, "one pass", 2.0, notes)], "memory")


if __name__ == "__main__":
    main(sys.argv[1:])
