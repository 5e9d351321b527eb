"""What the towers are measured against: open_clip's model with our weights, its loss, AdamW; the same inputs."""

import random
from collections.abc import Callable
from contextlib import nullcontext

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from cliplab.tokenizer import Tokenizer

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]


def made_up_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of 9 to 18 words of one or two syllables: one to three tokens each."""
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices(SYLLABLES, k=draw.randint(1, 2)))  # noqa: E731
    return [" ".join(word() for _ in range(draw.randint(9, 18))) for _ in range(count)]


def captions_like_coco(count: int, seed: int = 0) -> list[str]:
    """Plain English of COCO's lengths: 8 to 16 words, 11 on average."""
    draw = random.Random(seed)
    some = lambda words: draw.choice(words.split())  # noqa: E731
    nouns = "man woman dog cat bus train plate table child horse pizza giraffe bench kitchen street beach field boat"
    adjectives = "young old red large small white black wooden green parked empty snowy busy smiling"
    verbs = "sitting standing walking running lying waiting looking playing riding eating"
    captions = []
    for _ in range(count):
        first = f"A {some(adjectives)} {some(nouns)} {some(verbs)} {some('on near behind beside with')} a {some(nouns)}"
        more = [f"and a {some(adjectives)} {some(nouns)}", "in the background", "on a sunny day"]
        captions.append(" ".join([first, *more[: draw.choice((0, 1, 1, 1, 2))]]) + ".")
    return captions


def batches(count: int, size: int, image_size: int = 224, seed: int = 0) -> list[dict[str, Tensor]]:
    """uint8 images [B, 3, H, W] of noise and token ids [B, 77]."""
    generator = torch.Generator().manual_seed(seed)
    shape, ids = (size, 3, image_size, image_size), Tokenizer()(made_up_captions(count * size, seed))
    return [
        {"image": torch.randint(256, shape, generator=generator, dtype=torch.uint8), "text": text}
        for text in ids.split(size)
    ]


def open_clip_model(arch: str, like: nn.Module) -> nn.Module:
    """open_clip's model with the weights of ours."""
    model = open_clip.create_model(arch)
    assert isinstance(model, nn.Module)
    model.load_state_dict(like.state_dict())
    return model


class OpenCLIPStep:
    """A train step by open_clip's recipe: its forward, its ClipLoss, gradients set to None, a clamped scale."""

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        self.model, self.loss, self.bf16 = model.train(), ClipLoss(), bf16

    def gradients(self, image: Tensor, text: Tensor) -> float:
        """Normalised images [B, 3, H, W], ids [B, L] -> the loss, with its gradients in the parameters."""
        self.model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else nullcontext():
            image_features, text_features, scale = self.model(image, text)[:3]
            loss = self.loss(image_features, text_features, scale)
        loss.backward()
        return float(loss.detach())

    def optimizer(self, groups: list[dict], **options: bool) -> Callable[[], None]:
        """AdamW over groups of ours, by parameter name: {params: [names], lr, weight_decay}."""
        named = dict(self.model.named_parameters())
        own = [{**group, "params": [named[name] for name in group["params"]]} for group in groups]
        adamw = torch.optim.AdamW(own, betas=(0.9, 0.98), eps=1e-6, **options)
        scale = named["logit_scale"]

        def step() -> None:
            adamw.step()
            with torch.no_grad():
                scale.clamp_(0, 4.6052)

        return step
