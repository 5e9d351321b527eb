"""A tokenizer of a few words, framed as CLIP, BERT or SigLIP frame theirs, and their rules written as list handling."""

import torch
from torch import Tensor

FRAMES = {"clip": (90, 91, 0), "bert": (2, 3, 1), "siglip": (None, 1, 1)}  # start, end, padding


class Words:
    """`known` words get ids from 5 on, the others the next one. Cut to `length` with the end kept."""

    def __init__(self, known: str, length: int = 12, frame: tuple[int | None, int, int] = FRAMES["clip"]) -> None:
        self.known, self.length = known.split(), length
        self.start, self.end, self.padding = frame

    def numbers(self, text: str) -> list[int]:
        """The ids of the words alone."""
        return [5 + (self.known.index(word) if word in self.known else len(self.known)) for word in text.split()]

    def framed(self, words: list[int]) -> list[int]:
        """Start, words, end, padding."""
        start = [] if self.start is None else [self.start]
        room = self.length - len(start) - 1
        ids = [*start, *words[:room], self.end]
        return ids + [self.padding] * (self.length - len(ids))

    def __call__(self, text: str) -> Tensor:
        return torch.tensor([self.framed(self.numbers(text))])

    def batch(self, *texts: str) -> Tensor:
        """Ids [B, L]."""
        return torch.cat([self(text) for text in texts])
