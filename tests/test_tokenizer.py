import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers

import cliplab
from cliplab.errors import UserError
from cliplab.tokenizer import Tokenizer, tokenize
from tests.data.test_real_annotations import needs

LONG = "is " + "very " * 90 + "long"
TEXTS = ["a red dress", LONG, "", "l'été &amp; naïve", "Hello World!", "  don't;\tx-ray  123 ", "日本 🎉", "ﬁne"]


def test_ids_of_the_documented_example() -> None:
    ids = Tokenizer()("Hello World!")
    assert ids.shape == (1, 77)
    assert ids[0, :6].tolist() == [49406, 3306, 1002, 256, 49407, 0]


@pytest.mark.parametrize("length", [16, 77])
def test_equals_open_clip_and_keeps_the_end_of_long_texts(length: int) -> None:
    ids = Tokenizer(length)(TEXTS)
    assert torch.equal(ids, open_clip.SimpleTokenizer(context_length=length)(TEXTS))
    assert ids.dtype == torch.int64
    assert (ids == 49407).sum(dim=1).tolist() == [1] * len(TEXTS) and ids[1, -1] == 49407


def test_options_of_open_clip() -> None:
    found = Tokenizer(16, options={"clean": "canonicalize", "reduction_mask": "simple"})(["A_red, Dress!"])
    assert torch.equal(
        found,
        open_clip.SimpleTokenizer(context_length=16, clean="canonicalize", reduction_mask="simple")(["A_red, Dress!"]),
    )
    assert not torch.equal(found, Tokenizer(16)(["A_red, Dress!"]))


def test_open_clip_is_imported_at_the_first_call_only() -> None:
    tokenizer = Tokenizer()
    assert "_tokenize" not in tokenizer.__dict__
    tokenizer("a")
    assert "_tokenize" in tokenizer.__dict__


def test_captions_and_their_ids_as_published() -> None:
    """500 of 500; the padding was left away."""
    rows = (needs("tokenizer") / "coco_captions_token_ids.tsv").read_text(encoding="utf-8").splitlines()[1:]
    captions, expected = zip(*(row.split("\t") for row in rows), strict=True)
    assert len(rows) == 500
    for ids, caption, numbers in zip(Tokenizer()(captions), captions, expected, strict=True):
        wanted = [int(number) for number in numbers.split(" ")]
        assert ids.tolist() == wanted + [0] * (77 - len(wanted)), caption


# OpenAI's function


def test_tokenize_is_openais() -> None:
    assert torch.equal(cliplab.tokenize(TEXTS[2:], 32), open_clip.SimpleTokenizer(context_length=32)(TEXTS[2:]))
    assert tokenize("a").shape == (1, 77)
    with pytest.raises(UserError, match="'is very very .* has 94 tokens, more than 77: truncate=True cuts it"):
        tokenize(["short", LONG])
    assert torch.equal(tokenize(LONG, truncate=True), open_clip.SimpleTokenizer()([LONG]))
    exact = "very " * 75
    assert tokenize(exact)[0, -1] == 49407 and tokenize(exact)[0, -2] != 49407
    with pytest.raises(UserError, match="has 78 tokens, more than 77"):
        tokenize("very " * 76)


def test_lengths_and_what_is_cut() -> None:
    tokenizer = Tokenizer(6)
    texts = ["a red dress", "a very red dress", "a very very red dress", ""]
    assert [tokenizer.length(text) for text in texts] == [5, 6, 7, 2]
    cut = [tokenizer.is_cut(text, ids) for text, ids in zip(texts, tokenizer(texts), strict=True)]
    assert cut == [False, False, True, False]


# Hugging Face's


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dress", "##es"])
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return tmp_path


def test_a_folder_is_transformers_tokenizer_as_open_clip_calls_it(folder: Path) -> None:
    texts = ["A red dress", "dresses", "", "red " * 20]
    tokenizer = Tokenizer(8, str(folder))
    ids = tokenizer(texts)
    assert torch.equal(ids, open_clip.tokenizer.HFTokenizer(str(folder), context_length=8)(texts))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(texts, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, expected) and ids[0].tolist() == [2, 5, 6, 7, 3, 0, 0, 0]
    assert tokenizer.length("A red dress") == 5
    assert [tokenizer.is_cut(text, row) for text, row in zip(texts, ids, strict=True)] == [False, False, False, True]


@pytest.mark.parametrize("options", [{"clean": "canonicalize"}, {"strip_sep_token": True}], ids=str)
def test_options_of_the_config_arrive(folder: Path, options: dict[str, Any]) -> None:
    found = Tokenizer(8, str(folder), None, options)(["a_red, dress!"])
    assert torch.equal(
        found, open_clip.tokenizer.HFTokenizer(str(folder), context_length=8, **options)(["a_red, dress!"])
    )
    assert not torch.equal(found, Tokenizer(8, str(folder))(["a_red, dress!"]))


@pytest.mark.parametrize("content", [None, "{", '{"tokenizer_class": "NoSuchTokenizer"}'])
def test_a_folder_without_a_tokenizer_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="can't build the tokenizer") as error:
        Tokenizer(8, str(tmp_path))("a")
    assert str(tmp_path) in str(error.value)


def test_no_code_of_a_folder_is_run(folder: Path) -> None:
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\n")
    with pytest.raises(UserError, match="can't build the tokenizer"):
        Tokenizer(8, str(folder))("a")
    assert not (folder / "was-run").exists()
