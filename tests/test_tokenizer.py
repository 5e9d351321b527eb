import open_clip
import torch

from cliplab.tokenizer import Tokenizer


def test_ids_of_the_documented_example():
    ids = Tokenizer()("Hello World!")
    assert ids.shape == (1, 77)
    assert ids[0, :6].tolist() == [49406, 3306, 1002, 256, 49407, 0]


def test_equals_open_clip_and_keeps_the_end_of_long_texts():
    texts = ["a red dress", "is " + "very " * 40 + "long", "", "l'été &amp; naïve"]
    ids = Tokenizer(16)(texts)
    assert torch.equal(ids, open_clip.SimpleTokenizer(context_length=16)(texts))
    assert ids.dtype == torch.int64
    assert (ids == 49407).any(dim=1).all()


def test_open_clip_is_imported_at_the_first_call_only():
    tokenizer = Tokenizer()
    assert "_tokenize" not in tokenizer.__dict__
    tokenizer("a")
    assert "_tokenize" in tokenizer.__dict__
