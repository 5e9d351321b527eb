"""Texts and images to vectors, as `Encoder.encode` and `load(precision="bf16")` give them, beside open_clip.

python -m benchmarks.encode [ARCH] [--captions 1000] [--images 64] [--rounds 5]
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import cliplab
from benchmarks.measure import Row, interleave, show
from benchmarks.peers import batches, captions_like_coco, open_clip_model
from benchmarks.products import Recorder
from cliplab.precision import exact_fp32

BATCH = 64
OURS, PEER, LIMIT = "ours", "open_clip", "our bare products"


def sides(ours: Callable[[], Tensor], peer: Callable[[], Tensor]) -> dict[str, Callable[[], object]]:
    """The two and the products of ours."""
    with Recorder() as work:
        ours()
    return {OURS: ours, PEER: peer, LIMIT: work.replay}


def texts(arch: str, count: int, rounds: int) -> list[Row]:
    """Captions in fp32; both sides tokenize."""
    captions = captions_like_coco(count)
    encoder = cliplab.Encoder(*cliplab.load(arch))
    peer = open_clip_model(arch, encoder.model).eval()

    def theirs() -> Tensor:
        parts = [captions[start : start + BATCH] for start in range(0, count, BATCH)]
        with torch.no_grad():
            return torch.cat([peer.encode_text(encoder.tokenizer(part), normalize=True) for part in parts])

    def ours() -> Tensor:
        return encoder.encode(text=captions, batch_size=BATCH)

    apart = float((ours() - theirs()).abs().max())
    timings = interleave(sides(ours, theirs), rounds)
    question = f"encode {count:,} COCO-like captions, {arch}, fp32, batches of {BATCH}"
    row = timings.row(question, OURS, PEER, count, "captions/s", 5.0 if arch == "ViT-B-32" else None)
    return [
        replace(row, notes=f"at most {apart:.1e} apart"),
        timings.row(question, OURS, LIMIT, count, "captions/s", 0.95),
    ]


def images(arch: str, count: int, rounds: int) -> list[Row]:
    """Pictures in bf16: weights cast once, or open_clip's model under autocast."""
    exact, half = cliplab.load(arch).model.eval(), cliplab.load(arch, precision="bf16").model.eval()
    half.load_state_dict(exact.state_dict())
    peer = open_clip_model(arch, exact).eval()
    (batch,) = batches(1, count, exact.visual.image_size)
    pixels = batch["image"].float() / 128 - 1

    def theirs() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return peer.encode_image(pixels, normalize=True)

    def ours() -> Tensor:
        with torch.no_grad():
            return half.encode_image(pixels, normalize=True)

    with torch.no_grad(), exact_fp32(pixels.device):
        cosine = F.cosine_similarity(ours().float(), exact.encode_image(pixels)).min()
    timings = interleave(sides(ours, theirs), rounds)
    question = f"encode images, {arch}, bf16, batches of {count}"
    row = timings.row(question, OURS, PEER, count, "images/s", 2.2 if arch == "ViT-B-32" else None)
    note = f"cosine to fp32 at least {float(cosine):.6f}"
    assert cosine >= 0.9995, note
    return [replace(row, notes=note), timings.row(question, OURS, LIMIT, count, "images/s", 0.95)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("arch", nargs="?", default="ViT-B-32")
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    show(texts(given.arch, given.captions, given.rounds) + images(given.arch, given.images, given.rounds), "encode")


if __name__ == "__main__":
    main()
