"""Against lists of numbers."""

import random

import pytest
import torch

from cliplab.models.text_frame import TextFrame
from cliplab.tokenizer import Tokenizer
from tests.words import FRAMES, Words

KNOWN = "a photo of $ that is red long blue"


@pytest.fixture(params=FRAMES)
def words(request: pytest.FixtureRequest) -> Words:
    return Words(KNOWN, 9, FRAMES[request.param])


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["", *(" ".join(draw.choices(KNOWN.split(), k=draw.randint(0, longest))) for _ in range(count - 1))]


def test_the_frame_is_found(words: Words) -> None:
    frame = TextFrame(words)
    assert (frame.starts, frame.end, frame.padding, frame.length) == (
        int(words.start is not None),
        words.end,
        words.padding,
        9,
    )


def test_words_and_ends(words: Words) -> None:
    frame = TextFrame(words)
    for text in texts(60, 12):  # longer than the context too
        ids = words(text)
        room = 9 - frame.starts - 1
        kept = words.numbers(text)[:room]
        assert frame.words(ids).tolist() == kept
        assert frame.ends(ids).tolist() == [frame.starts + len(kept)]
        assert frame.inside(ids)[0].tolist() == [frame.starts <= place < frame.starts + len(kept) for place in range(9)]


@pytest.mark.parametrize(("before", "after"), [("a photo of $", ""), ("", "that"), ("$", "is red"), ("", "")])
def test_words_around_a_text(before: str, after: str, words: Words) -> None:
    """The last words of the text give way."""
    frame, given = TextFrame(words), texts(60, 12, seed=1)
    first, last = words.numbers(before), words.numbers(after)
    room = 9 - frame.starts - 1 - len(first) - len(last)
    expected = [words.framed([*first, *words.numbers(text)[:room], *last]) for text in given]
    found = frame.around(words.batch(*given), torch.tensor(first).long(), torch.tensor(last).long())
    assert found.tolist() == expected
    assert any(len(words.numbers(text)) > room for text in given) and any(not text for text in given)


def test_kept_ids_move_together(words: Words) -> None:
    frame, ids = TextFrame(words), words.batch(*texts(20, 8, seed=2))
    kept = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    for row, keep, found in zip(ids.tolist(), kept.tolist(), frame.packed(ids, kept).tolist(), strict=True):
        left = [number for number, is_kept in zip(row, keep, strict=True) if is_kept]
        assert found == left + [words.padding] * (9 - len(left))


def test_clips_own_tokenizer() -> None:
    """It pads with 0, which is the id of an exclamation mark."""
    tokenizer = Tokenizer(12)
    frame = TextFrame(tokenizer)
    assert (frame.starts, frame.end, frame.padding) == (1, 49407, 0)
    around = [frame.words(tokenizer(part)) for part in ("a photo of $ that", "")]
    ids = torch.cat([tokenizer(text) for text in ("is red !", "!", "is " * 20)])
    expected = ["a photo of $ that is red !", "a photo of $ that !", "a photo of $ that " + "is " * 20]
    assert frame.around(ids, *around).tolist() == torch.cat([tokenizer(text) for text in expected]).tolist()
