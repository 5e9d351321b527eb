import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cliplab import build
from cliplab.config import load_config
from cliplab.data.images import ImageTransform, Preprocess
from cliplab.data.rows import TrainRows
from cliplab.data.triplets import Triplets, read_triplets
from cliplab.errors import UserError
from cliplab.tokenizer import Tokenizer

NAMES = [f"part/{number}.png" for number in range(12)]


def line(place: int, texts: list[str] | str, negatives: list[int] | None = None) -> dict:
    """Reference `place`, target the next one; the first hard negative is the query image, as in MegaPairs."""
    row = {"q_img": NAMES[place], "q_text": texts, "t_img": NAMES[place + 1]}
    return row if negatives is None else row | {"hns": [NAMES[place], *(NAMES[n] for n in negatives)]}


TRAIN = [line(0, ["redder", "more red"], [4, 5, 6, 7]), line(2, "wider", [8]), line(4, ["x"], [9, 10, 11])]
VAL = [line(0, ["redder", ""], [6]), line(8, ["wider", "broader"])]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    write(tmp_path, "train-000", TRAIN[:2])
    write(tmp_path, "train-001", TRAIN[2:])
    write(tmp_path, "val", VAL)
    return tmp_path


def write(root: Path, name: str, rows: list[dict]) -> Path:
    path = root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def test_the_training_table(root: Path) -> None:
    table = Triplets(root).train_table(Triplets.make_protocol({}))
    assert table["texts"][:] == [["redder", "more red"], ["wider"], ["x"]]
    assert table["reference"][:] == [str(root / NAMES[n]) for n in (0, 2, 4)]
    assert table["target"][:] == [str(root / NAMES[n]) for n in (1, 3, 5)]
    assert table["negatives"][:] == [[str(root / NAMES[n]) for n in each] for each in ([4, 5, 6, 7], [8], [9, 10, 11])]
    assert len({*table["target_id"][:], *table["reference_id"][:]}) == 6
    each = Triplets(root).train_table(Triplets.make_protocol({"train_join": "each_caption"}))
    assert each["texts"][:] == [["redder"], ["more red"], ["wider"], ["x"]]


def test_the_benchmark(root: Path) -> None:
    (benchmark,) = Triplets(root).benchmarks(Triplets.make_protocol({}), "val")
    assert benchmark.gallery["id"][:] == [NAMES[n] for n in (0, 1, 6, 8, 9)]
    assert benchmark.queries["text"][:] == ["redder", "wider", "broader"]
    assert benchmark.queries["reference_id"][:] == [0, 3, 3] and benchmark.queries["query_id"][:] == [0, 1, 2]
    assert benchmark.positives == [[1], [4], [4]]
    assert not benchmark.protocol.exclude_reference


def test_counts(root: Path) -> None:
    counts = Triplets(root).counts()
    assert counts["train"] == {"records": 3, "images": 12, "hard_negatives": 8, "empty_captions": 0}
    assert counts["val"] == {"records": 2, "images": 5, "hard_negatives": 1, "empty_captions": 1}


def test_hard_negatives_are_drawn_anew_each_epoch_from_a_rows_own(root: Path) -> None:
    table = Triplets(root).train_table(Triplets.make_protocol({}))
    transform = ImageTransform(Preprocess(size=8, mean=(0.0,) * 3, std=(1.0,) * 3))
    rows = TrainRows(table, transform, Tokenizer(), seed=0)
    assert "negatives" not in rows.__getitems__([(0, 0)])
    rows.hard_negatives = 3
    own = [{4, 5, 6, 7}, {8}, {9, 10, 11}]
    seen: list[set[int]] = [set(), set(), set()]
    draws = []
    for epoch in range(12):
        images = rows.__getitems__([(row, epoch) for row in range(3)])["negatives"]["image"]
        assert images.shape == (3, 3, 3, 8, 8) and images.dtype == torch.uint8
        numbers = images[:, :, 0, 0, 0].tolist()
        assert all(len(set(each)) == min(3, len(pool)) for each, pool in zip(numbers, own, strict=True))
        draws.append(numbers)
        for place, each in enumerate(numbers):
            seen[place] |= set(each)
    assert seen == own and len({json.dumps(each) for each in draws}) > 3
    alone = rows.__getitems__([(2, 5)])["negatives"]["image"][:, :, 0, 0, 0].tolist()
    assert alone == [draws[5][2]], "what is drawn depends on seed, epoch and row alone"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"val.jsonl: line 2 is not valid JSON"),
        ('{"q_img": "a", "q_text": ["x"]}', r"line 2 has no 't_img'; a line is"),
        ("3", r"line 2 has no 'q_img'"),
        ('{"q_img": "a", "q_text": [], "t_img": "b"}', r"line 2: q_img and t_img must be paths, q_text one text"),
        ('{"q_img": "a", "q_text": [1], "t_img": "b"}', r"line 2: q_img and t_img must be paths"),
        ('{"q_img": "a", "q_text": "x", "t_img": "b", "hns": "c"}', r"hns a list of paths"),
        ('{"q_img": "../a", "q_text": "x", "t_img": "b"}', r"line 2: the paths of images must lie below"),
    ],
)
def test_a_broken_line_is_named(root: Path, text: str, said: str) -> None:
    path = root / "val.jsonl"
    path.write_text(json.dumps(VAL[0]) + "\n" + text + "\n")
    with pytest.raises(UserError, match=said):
        read_triplets(path)


def test_what_is_missing_is_named(root: Path) -> None:
    protocol = Triplets.make_protocol({})
    (root / "val.jsonl").unlink()
    with pytest.raises(UserError, match=r"no val\*.jsonl in .*hold some lines of the training file out"):
        Triplets(root).check(protocol, ["train", "val"])
    with pytest.raises(UserError, match="data.split=test: triplets have train, val"):
        Triplets(root).check(protocol, ["test"])
    (root / "val.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no validation rows"):
        Triplets(root).check(protocol, ["val"])
    (root / NAMES[9]).unlink()
    with pytest.raises(UserError, match=r"1 image\(s\) not found in .*part/9.png"):
        Triplets(root).check(protocol, ["train"])
    table = Triplets(root).train_table(Triplets.make_protocol({"missing_images": "report"}))
    assert table["negatives"][2] == [str(root / NAMES[n]) for n in (10, 11)]


def test_samples_without_hard_negatives_are_refused_where_some_are_asked_for(root: Path) -> None:
    Triplets(root).check_negatives()
    write(root, "train-000", [line(0, "x", [4]), line(2, "y", [3]), line(4, "z")])
    with pytest.raises(UserError, match=r"triplet 2 \(part/2.png to part/3.png\) names no hard negative \(hns\)"):
        Triplets(root).check_negatives()


def test_a_batch_reaches_the_loss_with_its_negatives(root: Path, tiny_config: Path) -> None:
    given = ["data.name=triplets", f"data.root={root}", "data.batch_size=3", "data.hard_negatives=2"]
    given += ["model.composer=sum", "loss=reference_negative", "trainer.monitor=val/triplets/R@1"]
    config = load_config(tiny_config, given)
    dataset = build.check(config)
    model, built_from = build.build_model(config)
    module = build.build_module(config, model, built_from)
    batch = next(iter(build.build_datamodule(config, dataset, model, built_from).train_dataloader()))
    assert batch["negatives"]["image"].shape == (3, 2, 3, 32, 32)
    pairs = model.training_pairs(batch["query"], batch["target"])
    found = module._loss_of(pairs[0], module._given(pairs, batch)[0])
    negatives = torch.stack([model.encode_target({"image": images}) for images in batch["negatives"]["image"]])
    own = torch.cat([pairs[0].reference[:, None], negatives], dim=1)
    logits = model.scale * torch.cat([pairs[0].query @ pairs[0].target.T, (pairs[0].query[:, None] * own).sum(-1)], 1)
    torch.testing.assert_close(found, -logits.log_softmax(dim=1).diagonal().mean(), rtol=1e-5, atol=1e-5)
