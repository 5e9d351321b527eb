from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from cliplab.benchmark import make_protocol
from cliplab.data.datamodule import EpochSampler, FashionIQDataModule, KarpathyDataModule, RetrievalDataModule
from cliplab.data.fashioniq import FashionIQ
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.images import ImageTransform, Preprocess, read_image
from cliplab.errors import UserError, message_of
from tests.data.conftest import write_json
from tests.image_folders import make_image_folder

LENGTH = 60
SMALL: dict[str, Any] = {"preprocess": Preprocess(size=8), "batch_size": 2, "eval_batch_size": 3}


def tokenize(text: str) -> Tensor:
    """Its UTF-8 bytes as int64 [1, LENGTH], so that the text can be read back."""
    return torch.tensor([list(text.encode().ljust(LENGTH, b"\0"))])


def text_of(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).rstrip(b"\0").decode()


def fashioniq(root: Path, protocol: str = "clip4cir", **options: Any) -> FashionIQDataModule:
    return FashionIQDataModule(root, protocol=protocol, tokenize=tokenize, **(SMALL | options))


def rows_of(loader: DataLoader) -> list[int]:
    return [row for batch in loader for row in batch["row_id"].tolist()]


def train_epoch(module: RetrievalDataModule, epoch: int) -> dict[int, tuple[str, bytes, bytes]]:
    """Row id -> text, reference and target pixels as drawn in an epoch."""
    loader = module.train_dataloader()
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    drawn = {}
    for batch in loader:
        for position, row in enumerate(batch["row_id"].tolist()):
            query, target = batch["query"], batch["target"]
            pictures = (images[position].numpy().tobytes() for images in (query["image"], target["image"]))
            drawn[row] = (text_of(query["text"][position]), *pictures)
    return drawn


def assert_images(images: Tensor, count: int) -> None:
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (count, 3, 8, 8))


def assert_ids(batch: dict[str, Any], names: set[str], count: int) -> None:
    assert {key for key in batch if key not in ("query", "target")} == names
    assert all(batch[name].dtype == torch.int64 and tuple(batch[name].shape) == (count,) for name in names)


# The vocabulary


def test_a_training_batch_of_composed_queries(fashioniq_root: Path) -> None:
    batch = next(iter(fashioniq(fashioniq_root).train_dataloader()))
    assert set(batch["query"]) == {"image", "text"} and set(batch["target"]) == {"image"}
    assert_images(batch["query"]["image"], 2)
    assert_images(batch["target"]["image"], 2)
    assert (batch["query"]["text"].dtype, tuple(batch["query"]["text"].shape)) == (torch.int64, (2, LENGTH))
    assert_ids(batch, {"row_id", "query_id", "target_id", "reference_id"}, 2)
    assert torch.equal(batch["query_id"], batch["row_id"])


def test_a_training_sample_is_the_row_it_names(fashioniq_root: Path) -> None:
    module = fashioniq(fashioniq_root)
    table = module.dataset.train_table(module.protocol)
    show = ImageTransform(Preprocess(size=8))
    seen = []
    for batch in module.train_dataloader():
        for position, row_id in enumerate(batch["row_id"].tolist()):
            row = table[row_id]
            assert torch.equal(batch["query"]["image"][position], show(read_image(row["reference"])))
            assert torch.equal(batch["target"]["image"][position], show(read_image(row["target"])))
            assert text_of(batch["query"]["text"][position]) in row["texts"]
            assert batch["reference_id"][position] == row["reference_id"]
            assert batch["target_id"][position] == row["target_id"]
            seen.append(row_id)
    assert sorted(seen) == [0, 1, 2, 3]


def test_a_training_batch_of_captions_has_no_reference(karpathy_root: Path) -> None:
    batch = next(iter(KarpathyDataModule(karpathy_root, tokenize=tokenize, **SMALL).train_dataloader()))
    assert set(batch["query"]) == {"text"} and set(batch["target"]) == {"image"}
    assert batch["reference_id"].tolist() == [-1, -1]
    assert sorted(batch["target_id"].tolist()) == [0, 1]


def test_evaluation_batches_of_composed_queries(fashioniq_root: Path) -> None:
    queries, gallery = fashioniq(fashioniq_root).val_dataloader()[:2]
    batch = next(iter(queries))
    assert set(batch["query"]) == {"image", "text"} and "target" not in batch
    assert_images(batch["query"]["image"], 2)
    assert_ids(batch, {"row_id", "query_id", "reference_id"}, 2)
    assert [text_of(tokens) for tokens in batch["query"]["text"]] == ["Is blue and shorter", " and is red"]
    assert batch["reference_id"].tolist() == [2, 3]
    batch = next(iter(gallery))
    assert set(batch["target"]) == {"image"} and "query" not in batch
    assert_images(batch["target"]["image"], 3)
    assert_ids(batch, {"row_id", "target_id"}, 3)
    assert batch["target_id"].tolist() == batch["row_id"].tolist() == [0, 1, 2]


def test_evaluation_batches_of_captions(karpathy_root: Path) -> None:
    queries, gallery = KarpathyDataModule(karpathy_root, tokenize=tokenize, **SMALL).test_dataloader()
    batches = list(queries)
    assert [set(batch["query"]) for batch in batches] == [{"text"}, {"text"}]
    assert [text_of(tokens) for batch in batches for tokens in batch["query"]["text"]] == ["c0", "c1", "", "e0", "e1"]
    (batch,) = gallery
    assert set(batch["target"]) == {"image"} and batch["target_id"].tolist() == [0, 1]


def test_wordings_of_a_query_share_its_query_id(fashioniq_root: Path) -> None:
    batch = next(iter(fashioniq(fashioniq_root, "searle", eval_batch_size=4).val_dataloader()[0]))
    assert batch["row_id"].tolist() == [0, 1, 2, 3]
    assert batch["query_id"].tolist() == [0, 0, 1, 1]


# Loaders


def test_evaluation_has_queries_and_gallery_of_each_benchmark_in_order(fashioniq_root: Path) -> None:
    module = fashioniq(fashioniq_root)
    loaders = module.val_dataloader()
    assert [rows_of(loader) for loader in loaders] == [[0, 1], [0, 1, 2, 3], [0], [0, 1, 2], [0], [0, 1, 2]]
    assert [next(iter(loader)).keys() & {"query", "target"} for loader in loaders] == [{"query"}, {"target"}] * 3
    shown = [text_of(next(iter(loader))["query"]["text"][0]) for loader in loaders[::2]]
    assert shown == ["Is blue and shorter", "Is plain and has buttons", "Is bolder and is tighter"]


def test_the_last_gallery_batch_is_kept(fashioniq_root: Path) -> None:
    gallery = fashioniq(fashioniq_root).val_dataloader()[1]
    assert [len(batch["row_id"]) for batch in gallery] == [3, 1]


def test_test_loaders_are_those_of_the_test_split(fashioniq_root: Path, karpathy_root: Path) -> None:
    """FashionIQ's test targets are not public: its test split is val."""
    assert [rows_of(loader) for loader in fashioniq(fashioniq_root).test_dataloader()[:2]] == [[0, 1], [0, 1, 2, 3]]
    module = KarpathyDataModule(karpathy_root, tokenize=tokenize, **SMALL)
    assert [rows_of(loader) for loader in module.test_dataloader()] == [[0, 1, 2, 3, 4], [0, 1]]
    assert [rows_of(loader) for loader in module.val_dataloader()] == [[0], [0]]


def test_benchmarks_are_built_once(fashioniq_root: Path) -> None:
    module = fashioniq(fashioniq_root)
    assert module.benchmarks("val") is module.benchmarks("val")


def test_an_incomplete_training_batch_is_dropped(fashioniq_root: Path) -> None:
    batches = list(fashioniq(fashioniq_root, batch_size=3).train_dataloader())
    assert [len(batch["row_id"]) for batch in batches] == [3]


def test_the_protocol_may_be_a_mapping_or_the_data_sets_own(fashioniq_root: Path) -> None:
    part = {"name": "clip4cir", "gallery": "val_split"}
    assert FashionIQDataModule(fashioniq_root, protocol=part, **SMALL).protocol == make_protocol(part)
    module = RetrievalDataModule(FashionIQ(fashioniq_root))
    assert module.protocol.name == "clip4cir"


def test_too_few_samples_for_a_batch_name_the_option(fashioniq_root: Path) -> None:
    with pytest.raises(
        UserError, match=r"^4 training samples are fewer than one batch \(5 x 1 .*lower data.batch_size"
    ):
        fashioniq(fashioniq_root, batch_size=5).train_dataloader()
    assert len(fashioniq(fashioniq_root, batch_size=4).train_dataloader()) == 1


@pytest.mark.parametrize("options", [{"pad": "round"}, {"crop_scale": 2.0}])
def test_image_options_are_checked_at_once(fashioniq_root: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(options))}"):
        fashioniq(fashioniq_root, **options)


# What is drawn at random


def test_texts_and_crops_depend_on_the_epoch_and_repeat_for_the_same(fashioniq_root: Path) -> None:
    options = {"crop_scale": 0.5, "flip": True}
    for path in (fashioniq_root / "images").iterdir():
        rng = np.random.default_rng(sum(path.name.encode()))
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    first, second = (fashioniq(fashioniq_root, **options) for _ in range(2))
    epochs = [train_epoch(first, epoch) for epoch in range(6)]
    assert epochs == [train_epoch(second, epoch) for epoch in range(6)]
    assert train_epoch(second, 3) == epochs[3]  # a resumed run starts in the middle
    for row in range(4):
        assert len({epoch[row][0] for epoch in epochs}) > 1, "texts"
        assert len({epoch[row][1] for epoch in epochs}) > 4, "crops of the reference"
        assert len({epoch[row][2] for epoch in epochs}) > 4, "crops of the target"


def test_every_text_of_a_sample_is_drawn_about_equally_often(fashioniq_root: Path) -> None:
    module = fashioniq(fashioniq_root, batch_size=4)
    rows = module.train_dataloader().dataset
    texts = [text_of(rows[0, epoch]["query"]["text"]) for epoch in range(200)]
    counts = {text: texts.count(text) for text in set(texts)}
    assert set(counts) == set(module.dataset.train_table(module.protocol)[0]["texts"]) and len(counts) == 4
    assert all(30 <= count <= 75 for count in counts.values())


def test_another_seed_draws_otherwise(fashioniq_root: Path) -> None:
    def texts(seed: int) -> list[str]:
        module = fashioniq(fashioniq_root, seed=seed)
        return [train_epoch(module, epoch)[row][0] for epoch in range(6) for row in range(4)]

    assert texts(0) == texts(0) != texts(1)


def test_the_order_is_shuffled_by_seed_and_epoch(fashioniq_root: Path) -> None:
    def orders(seed: int) -> list[list[int]]:
        loader = fashioniq(fashioniq_root, seed=seed).train_dataloader()
        assert isinstance(loader.sampler, EpochSampler)
        found = []
        for epoch in range(6):
            loader.sampler.set_epoch(epoch)
            found.append(rows_of(loader))
        return found

    assert orders(0) == orders(0) != orders(1)
    assert len({tuple(order) for order in orders(0)}) > 2
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders(0))


def test_processes_share_the_rows_and_repeat_them_only_in_evaluation(
    fashioniq_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_both(make: str) -> list[list[int]]:
        found = []
        for rank in (0, 1):
            module = fashioniq(fashioniq_root)
            monkeypatch.setattr(module, "_processes", lambda rank=rank: (2, rank))
            loader = getattr(module, make)()
            found.append(rows_of(loader if make == "train_dataloader" else loader[3]))  # three gallery rows of shirt
        return found

    first, second = of_both("train_dataloader")
    assert len(first) == len(second) == 2 and sorted(first + second) == [0, 1, 2, 3]
    assert of_both("val_dataloader") == [[0, 2], [1, 0]]


# Worker processes


def test_workers_load_what_the_main_process_loads(fashioniq_root: Path) -> None:
    assert train_epoch(fashioniq(fashioniq_root, num_workers=1), 2) == train_epoch(fashioniq(fashioniq_root), 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_alone_also_from_a_worker(fashioniq_root: Path, workers: int) -> None:
    path = fashioniq_root / "images" / "S2.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError) as error:
        list(fashioniq(fashioniq_root, num_workers=workers).train_dataloader())
    assert ("worker process" in str(error.value)) == bool(workers)
    message = message_of(error.value)
    assert message.startswith(f"can't read the image {path}: ") and message.endswith("replace it")
    assert "\n" not in message


def test_other_data_are_loaded_in_the_same_way(fashioniq_root: Path, tmp_path: Path) -> None:
    module = fashioniq(fashioniq_root)
    own = module.benchmarks("val")
    folder = ImageFolderDataset(make_image_folder(tmp_path / "pictures"))
    other = module.beside(folder, make_protocol({"name": "zero_shot_plain"}))
    pictures, prompts = other.test_dataloader()
    first = next(iter(pictures))
    assert (pictures.batch_size, len(pictures), len(prompts)) == (3, 2, 1)
    assert_images(first["query"]["image"], 3)
    tokens = next(iter(prompts))["target"]["text"]
    assert [text_of(row) for row in tokens] == [f"a photo of a {name}." for name in ("dress", "polar bear", "t-shirt")]
    assert module.benchmarks("val") is own and module.dataset is not folder


# Captions of one image in one batch


def captions(root: Path, **options: Any) -> KarpathyDataModule:
    """Each caption is a sample; images of 3, 2 and 1 captions, where images/ has a picture of each."""
    rows = [
        {"filename": name, "split": "train", "sentences": [{"raw": f"{name}{k}"} for k in range(count)]}
        for name, count in (("a.jpg", 3), ("b.jpg", 2), ("c.jpg", 1))
    ]
    write_json(root / "dataset_tiny.json", {"images": rows})
    protocol = {"train_join": "each_caption"}
    return KarpathyDataModule(root, tokenize=tokenize, protocol=protocol, **(SMALL | options))


def target_batches(module: RetrievalDataModule) -> list[list[int]]:
    return [batch["target_id"].tolist() for batch in module.train_dataloader()]


def test_captions_of_one_image_meet_in_no_batch(karpathy_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cliplab"):
        batches = target_batches(captions(karpathy_root))
    assert len(batches) == 3 and all(len(set(batch)) == 2 for batch in batches)
    assert "no image twice in a batch of 2: 6 of 6 training samples" in caplog.text
    assert len(target_batches(captions(karpathy_root, batch_size=3))) == 1
    with pytest.raises(UserError, match="^3 images are fewer than one batch .4 x 1 processes."):
        captions(karpathy_root, batch_size=4).train_dataloader()


def test_they_do_meet_where_they_are_not_kept_apart(karpathy_root: Path) -> None:
    batches = target_batches(captions(karpathy_root, batch_size=6, separate=False))
    assert sorted(batches[0]) == [0, 0, 0, 1, 1, 2]


def test_one_caption_an_image_changes_no_order(karpathy_root: Path) -> None:
    module = captions(karpathy_root)
    module.protocol = make_protocol({"name": "clip_benchmark"})
    assert type(module.train_dataloader().sampler) is EpochSampler
    assert KarpathyDataModule(karpathy_root).separate and not fashioniq(karpathy_root).separate


def test_the_processes_share_a_global_batch(karpathy_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in (0, 1):
        module = captions(karpathy_root, batch_size=1)
        monkeypatch.setattr(module, "_processes", lambda rank=rank: (2, rank))
        found.append(target_batches(module))
    assert len(found[0]) == 3 and all(mine != others for mine, others in zip(*found, strict=True))


def test_the_protocol_of_captions_may_be_an_object(karpathy_root: Path) -> None:
    protocol = make_protocol({"name": "clip_benchmark", "prompt": "a {}"})
    assert KarpathyDataModule(karpathy_root, protocol=protocol).protocol is protocol
    assert KarpathyDataModule(karpathy_root, protocol={"prompt": "a {}"}).protocol == protocol


def test_the_image_backend_arrives(fashioniq_root: Path) -> None:
    assert fashioniq(fashioniq_root).transform.backend == "exact"
    module = fashioniq(fashioniq_root, image_backend="fast")
    assert module.transform.backend == "fast"
    assert train_epoch(module, 1).keys() == train_epoch(fashioniq(fashioniq_root), 1).keys()


class ThreadCount(ImageTransform):
    def __call__(self, image: Any, generator: np.random.Generator | None = None) -> Tensor:
        return torch.tensor(torch.get_num_threads())


def test_a_worker_process_uses_one_thread(fashioniq_root: Path) -> None:
    """So that workers, of which there is one per core, don't fight for the cores."""
    module = fashioniq(fashioniq_root, num_workers=1, image_backend="fast")
    module.transform = ThreadCount(Preprocess(size=8))
    for loader in (module.train_dataloader(), *module.val_dataloader()[:2]):
        batch = next(iter(loader))
        counts = [part["image"] for part in (batch.get("query", {}), batch.get("target", {})) if "image" in part]
        assert counts and all(set(count.tolist()) == {1} for count in counts)
