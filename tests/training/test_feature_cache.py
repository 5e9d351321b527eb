"""Cached against uncached: losses, metrics, ranks; and what must not be taken from a cache."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cliplab import build
from cliplab.config import Config, load_config
from cliplab.data.images import ImageTransform, Preprocess
from cliplab.errors import UserError
from cliplab.models.composed import ComposedRetriever
from cliplab.models.composers import Composer, Sum
from cliplab.training.feature_cache import FeatureCache
from cliplab.training.feature_store import FeatureStore
from cliplab.training.module import RetrievalModule
from tests.image_folders import make_image_folder
from tests.models.test_composed import make_model
from tests.processes import in_processes
from tests.test_train import main_of
from tests.training.test_module import Curves, make_trainer

BOTH = "model.freeze=[image_encoder,text_encoder]"


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("cliplab"), "propagate", True)
    caplog.set_level(logging.INFO)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that were read."""
    found: list[str] = []
    read = ImageTransform.__call__

    def counting(self: ImageTransform, image: Any, *rest: Any) -> Tensor:
        found.append(str(image))
        return read(self, image, *rest)

    monkeypatch.setattr(ImageTransform, "__call__", counting)
    return found


def built(config: Config, train: bool = True) -> tuple[RetrievalModule, Any]:
    dataset = build.check(config)
    torch.manual_seed(3)
    model, built_from = build.build_model(config)
    return build.build_module(config, model, built_from), build.build_datamodule(
        config, dataset, model, built_from, train
    )


def outcome_of(config: Config) -> dict[str, Any]:
    """Two epochs of training, then a test."""
    module, data = built(config)
    seen, trainer = Curves(), make_trainer(2, precision=config.trainer.precision)
    trainer.callbacks.append(seen)
    trainer.fit(module, data)
    validated = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    tested = trainer.test(module, data, verbose=False)[0]
    ranks = {
        (way, name): ranked.ranks_under_protocol().tolist()
        for way, ranked_by_name in module.outcome.items()
        for name, ranked in ranked_by_name.items()
    }
    return {"losses": seen.losses, "val": validated, "test": tested, "ranks": ranks}


def assert_equal_outcomes(cached: dict[str, Any], plain: dict[str, Any]) -> None:
    assert len(plain["losses"]) == 18 and cached["losses"] == pytest.approx(plain["losses"], abs=1e-6, rel=0)
    for key in ("val", "test", "ranks"):
        assert cached[key] == plain[key], key


@pytest.mark.parametrize("composer", ["combiner", "tirg", "artemis", "sum"])
def test_a_run_over_features_equals_one_over_pictures(composer, tiny_config, tmp_path, decoded):
    options = [BOTH, f"model.composer={composer}"]
    plain = outcome_of(load_config(tiny_config, [*options, "data.feature_cache=null"]))
    decoded.clear()
    options.append(f"data.feature_cache={tmp_path / 'cache'}")
    assert_equal_outcomes(outcome_of(load_config(tiny_config, options)), plain)
    assert len(decoded) == len(set(decoded)) > 150, "each picture once"
    decoded.clear()
    assert_equal_outcomes(outcome_of(load_config(tiny_config, options)), plain)
    assert len(decoded) <= 2, "one of each file, to see whether it is still true"


@pytest.mark.parametrize("composer", ["cross_attention", "bidirectional", "pic2word", "lincir"])
def test_composers_that_take_more_than_vectors_give_the_same(composer, tiny_config, tmp_path):
    options = [BOTH, f"model.composer={composer}", *(["loss=mse"] if composer == "lincir" else [])]
    plain = outcome_of(load_config(tiny_config, [*options, "data.feature_cache=null"]))
    assert_equal_outcomes(outcome_of(load_config(tiny_config, [*options, f"data.feature_cache={tmp_path}"])), plain)


@pytest.mark.parametrize("frozen", ["image_encoder", "text_encoder"])
def test_one_frozen_tower_is_cached_alone(frozen, tiny_config, tmp_path, decoded):
    options = [f"model.freeze=[{frozen}]"]
    plain = outcome_of(load_config(tiny_config, [*options, "data.feature_cache=null"]))
    options.append(f"data.feature_cache={tmp_path / 'cache'}")
    outcome_of(load_config(tiny_config, options))
    decoded.clear()
    cached = outcome_of(load_config(tiny_config, options))
    assert_equal_outcomes(cached, plain)
    assert (len(decoded) <= 2) == (frozen == "image_encoder")
    kinds = {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert kinds == {"images" if frozen == "image_encoder" else "texts"}


def test_features_under_autocast_are_those_of_autocast(tiny_config, tmp_path):
    options = [BOTH, "trainer.precision=bf16-mixed"]
    plain = outcome_of(load_config(tiny_config, [*options, "data.feature_cache=null"]))
    cached = outcome_of(load_config(tiny_config, [*options, f"data.feature_cache={tmp_path}"]))
    assert cached["losses"] == pytest.approx(plain["losses"], abs=2e-3) and cached["test"] == plain["test"]
    module, data = built(load_config(tiny_config, [*options, f"data.feature_cache={tmp_path}"]))
    trainer = make_trainer(precision="bf16-mixed")
    trainer.test(module, data, verbose=False)
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader()[0])), 0)
    assert batch["query"]["image_features"].dtype == torch.bfloat16


def test_a_cached_batch_carries_rows_in_place_of_inputs(tiny_config, tmp_path):
    _, data = built(load_config(tiny_config, [BOTH, f"data.feature_cache={tmp_path}"]))
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert set(batch["query"]) == {"text_row", "image_row"} and set(batch["target"]) == {"image_row"}
    assert all(rows.dtype == torch.int64 and rows.shape == (16,) for rows in batch["query"].values())
    there = data.on_after_batch_transfer(batch, 0)
    assert {key: tuple(value.shape) for key, value in there["query"].items()} == {
        "image_features": (16, 16),
        "text_features": (16, 16),
    }
    assert torch.equal(there["row_id"], batch["row_id"])


def test_all_caption_joins_are_drawn_from_the_cache(tiny_config, tmp_path):
    """Row by row and epoch by epoch the very text that the uncached loader asks with."""
    module, data = built(load_config(tiny_config, [BOTH, f"data.feature_cache={tmp_path}"]))
    _, plain = built(load_config(tiny_config, [BOTH, "data.feature_cache=null"]))
    loaders, drawn = (data.train_dataloader(), plain.train_dataloader()), set()
    for epoch in range(3):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for batch, given in zip(*loaders, strict=True):
            features = data.on_after_batch_transfer(batch, 0)
            text = module.model.clip.encode_text(given["query"]["text"])
            torch.testing.assert_close(features["query"]["text_features"], text, rtol=1e-6, atol=1e-6)
            for role in ("query", "target"):
                image = module.model.clip.encode_image(module.model.normalize(given[role]["image"]))
                torch.testing.assert_close(features[role]["image_features"], image, rtol=0, atol=1e-6)
            drawn.update(batch["query"]["text_row"].tolist())
    assert len(drawn) > 144, "more texts than triplets: not one join alone"


@pytest.mark.parametrize("option", ["data.crop_scale=0.8", "data.flip=true"])
def test_pictures_that_are_drawn_anew_are_encoded_at_every_step(option, tiny_config, tmp_path, caplog):
    options = [BOTH, option]
    plain = outcome_of(load_config(tiny_config, [*options, "data.feature_cache=null"]))
    cached = load_config(tiny_config, [*options, f"data.feature_cache={tmp_path}"])
    assert_equal_outcomes(outcome_of(cached), plain)
    assert caplog.text.count("draw training pictures anew") == 1
    _, data = built(cached)
    batch = next(iter(data.train_dataloader()))
    assert set(batch["query"]) == {"image", "text_row"} and set(batch["target"]) == {"image"}
    assert set(next(iter(data.test_dataloader()[0]))["query"]) == {"image_row", "text_row"}


class Deep(Composer):
    """Needs the tokens of the picture and the text tower."""

    inputs = frozenset({"vectors", "image_tokens", "text_tower"})

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        assert extra["image_tokens"].dim() == 3 and extra["token_ids"].dim() == 2
        return torch.nn.functional.normalize(reference + text, dim=-1)


def test_a_composer_that_needs_more_than_vectors_gets_it(tiny_config, tmp_path, caplog):
    module, data = built(load_config(tiny_config, [BOTH, f"data.feature_cache={tmp_path}"]))
    module.model.composer = Deep()
    batch = next(iter(data.train_dataloader()))
    assert set(batch["query"]) == {"image", "text"} and set(batch["target"]) == {"image_row"}
    make_trainer().test(module, data, verbose=False)
    assert "takes image_tokens" in caplog.text and "takes text_tower" in caplog.text


def test_nothing_frozen_nothing_cached(tiny_config):
    _, data = built(load_config(tiny_config))
    assert data.features is None
    _, data = built(load_config(tiny_config), train=False)
    assert data.features is not None and {*data.features.towers} == {"image", "text"}, "an evaluation changes nothing"


# What a key is made of.


def pixels_of(name: str) -> Tensor:
    return ImageTransform(Preprocess(size=16))(name)


def tokens_of(text: str) -> Tensor:
    return torch.tensor([*(1 + len(word) % 17 for word in text.split()[:4]), 19, 0, 0, 0, 0, 0][:6])


def make_cache(folder: Path, model: ComposedRetriever, precision: str = "32-true", **transform: Any) -> FeatureCache:
    given = ImageTransform(Preprocess(size=16), **transform)
    return FeatureCache(folder, model, given, (precision,), ("image", "text"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [str(folder / f"{number}.png") for number in range(3)]
    for number, name in enumerate(names):
        Image.new("RGB", (20, 16 + number), (40 * number, 80, 10)).save(name)
    return names


def encoded(cache: FeatureCache, modality: str, items: list[str], load: Callable[[str], Tensor] | None = None) -> int:
    """How many had to be encoded to answer."""
    count = [0]

    def counting(item: str) -> Tensor:
        count[0] += item in items
        return (load or (pixels_of if modality == "image" else tokens_of))(item)

    rows = cache.rows(modality, items, counting, None)
    assert rows is not None and rows.shape == (len(items),)
    return count[0]


def change_image_weight(model: ComposedRetriever) -> None:
    with torch.no_grad():
        model.clip.visual.proj[0, 0] += 1e-6  # type: ignore[index]


def change_text_weight(model: ComposedRetriever) -> None:
    with torch.no_grad():
        model.clip.token_embedding.weight[3, 0] += 1e-6  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "images", "texts"), [(change_image_weight, 3, 0), (change_text_weight, 0, 2)], ids=["image", "text"]
)
def test_the_weights_of_a_tower_are_part_of_its_key(change, images, texts, tmp_path, pictures):
    model, words = make_model(Sum()), ["a red one", "blue"]
    cache = make_cache(tmp_path / "c", model)
    assert (encoded(cache, "image", pictures), encoded(cache, "text", words)) == (3, 2)
    other = make_cache(tmp_path / "c", make_model(Sum()))
    assert (encoded(other, "image", pictures), encoded(other, "text", words)) == (1, 1), "one each, to check"
    change(model)
    assert (encoded(cache, "image", pictures), encoded(cache, "text", words)) == (images, texts)


@pytest.mark.parametrize("options", [{"pad": "square"}, {"backend": "fast"}, {"precision": "bf16-mixed"}])
def test_preprocessing_and_precision_are_part_of_the_key(options, tmp_path, pictures):
    assert encoded(make_cache(tmp_path / "c", make_model(Sum())), "image", pictures) == 3
    assert encoded(make_cache(tmp_path / "c", make_model(Sum()), **options), "image", pictures) == 3


def test_another_tokenizer_is_another_table(tmp_path):
    assert encoded(make_cache(tmp_path / "c", make_model(Sum())), "text", ["a", "b"]) == 2
    cache = make_cache(tmp_path / "c", make_model(Sum()))
    assert encoded(cache, "text", ["a", "b"], lambda text: tokens_of(text + " more")) == 2


def test_a_changed_picture_and_a_changed_caption_are_encoded_again(tmp_path, pictures):
    model = make_model(Sum())
    encoded(make_cache(tmp_path / "c", model), "image", pictures)
    encoded(make_cache(tmp_path / "c", model), "text", ["is red", "is blue"])
    Image.new("RGB", (20, 17), (255, 255, 255)).save(pictures[1])
    cache = make_cache(tmp_path / "c", model)
    assert encoded(cache, "image", pictures) == 2, "the one that changed, and one to check"
    rows = cache.rows("image", pictures, pixels_of, None)
    assert rows is not None
    images = torch.stack([pixels_of(name) for name in pictures])
    torch.testing.assert_close(cache._stores["image"][1].gather(torch.from_numpy(rows)), _features(model, images))
    assert encoded(make_cache(tmp_path / "c", model), "text", ["is red", "is blue!"]) == 2


def test_a_touched_picture_of_the_same_size_is_another(tmp_path, pictures):
    cache = make_cache(tmp_path / "c", make_model(Sum()))
    encoded(cache, "image", pictures)
    os.utime(pictures[0], ns=(1, 1))
    assert encoded(cache, "image", pictures) == 1


def _features(model: ComposedRetriever, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval().image_features({"image": images})


def test_features_that_the_model_no_longer_gives_are_computed_again(tmp_path, pictures, monkeypatch, caplog):
    """The same weights and other code."""
    model = make_model(Sum())
    encoded(make_cache(tmp_path / "c", model), "image", pictures)
    encode = model.clip.encode_image
    monkeypatch.setattr(model.clip, "encode_image", lambda images: 1.01 * encode(images))
    cache = make_cache(tmp_path / "c", model)
    assert encoded(cache, "image", pictures) == 4
    assert "than the model gives now" in caplog.text
    rows = cache.rows("image", pictures, pixels_of, None)
    stored = cache._stores["image"][1].gather(torch.from_numpy(rows))  # type: ignore[arg-type]
    images = torch.stack([pixels_of(name) for name in pictures])
    torch.testing.assert_close(stored, _features(model, images))


def test_filling_draws_no_random_number_and_leaves_the_model_in_its_mode(tmp_path, pictures):
    model = make_model(Sum()).train()
    before = torch.get_rng_state()
    encoded(make_cache(tmp_path / "c", model), "image", pictures)
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_a_folder_that_cant_be_written_is_refused_if_it_was_asked_for(tmp_path, pictures, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = make_cache(tmp_path / "file" / "cache", make_model(Sum()))
    assert cache.rows("image", pictures, pixels_of, None) is None
    assert "nothing is cached" in caplog.text and not cache.covers("image", "target", False)
    cache = make_cache(tmp_path / "file" / "cache", make_model(Sum()))
    cache.is_asked = True
    with pytest.raises(UserError, match=r"data\.feature_cache=.*can't be written"):
        cache.rows("image", pictures, pixels_of, None)


def test_a_full_disk_is_one_clear_error(tmp_path, pictures, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureStore, "write", full)
    with pytest.raises(UserError, match=r"3 pictures.*No space left.*data\.feature_cache"):
        make_cache(tmp_path / "c", make_model(Sum())).rows("image", pictures, pixels_of, None)


def test_a_broken_picture_is_named(tmp_path, pictures):
    Path(pictures[2]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"can't read the image .*2\.png"):
        make_cache(tmp_path / "c", make_model(Sum())).rows("image", pictures, pixels_of, None)
    Path(pictures[2]).unlink()
    with pytest.raises(UserError, match=r"can't read the image .*2\.png"):
        make_cache(tmp_path / "c", make_model(Sum())).rows("image", pictures, pixels_of, None)


def _share(rank: int, folder: str, pictures: list[str]) -> Tensor:
    count = [0]

    def counting(name: str) -> Tensor:
        count[0] += 1
        return pixels_of(name)

    model = make_model(Sum())
    cache = make_cache(Path(folder), model)
    rows = cache.rows("image", pictures, counting, None)
    features = cache._stores["image"][1].gather(torch.from_numpy(rows))  # type: ignore[arg-type]
    true = _features(model, torch.stack([pixels_of(name) for name in pictures]))
    return torch.tensor([count[0], float((features - true).abs().max())])


def test_processes_of_a_run_share_the_work(tmp_path, pictures):
    counts, errors = torch.stack(in_processes(_share, 2, str(tmp_path / "c"), pictures)).unbind(1)
    assert counts.tolist() == [2, 1]
    assert float(errors.max()) < 1e-6


def test_runs_at_the_same_time_encode_each_picture_once(tmp_path, pictures):
    counts = torch.stack(in_processes(_alone, 2, str(tmp_path / "c"), pictures))
    assert sorted(counts.flatten().tolist()) == [0, 3]


def _alone(rank: int, folder: str, pictures: list[str]) -> Tensor:
    """A run of its own: no other process is known to it."""
    torch.distributed.is_initialized = lambda: False

    def slow(name: str) -> Tensor:
        time.sleep(0.2)
        return pixels_of(name)

    return torch.tensor([encoded(make_cache(Path(folder), make_model(Sum())), "image", pictures, slow)])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_an_evaluation_and_its_probe_read_what_another_has_computed(tiny_config, tmp_path, decoded):
    root = make_image_folder(tmp_path / "pictures")
    config = tmp_path / "zero.yaml"
    config.write_text(
        f"model: {{arch: {tiny_config.parent / 'tiny.json'}}}\n"
        f"data: {{name: image_folder, root: {root}, num_workers: 0}}\n"
        f"trainer: {{accelerator: cpu}}\nlinear_probe: true\noutput_dir: {tmp_path / 'runs'}\n"
    )
    found = {}
    for name, more in (("plain", "data.feature_cache=null"), ("cold", "debug=false"), ("warm", "debug=false")):
        decoded.clear()
        main_of("eval")(["--config", str(config), f"name={name}", more])
        (folder,) = (tmp_path / "runs" / name / "eval").iterdir()
        found[name] = results(folder)["metrics"]
        if name == "warm":
            assert len(decoded) <= 3
    assert found["plain"] == found["cold"] == found["warm"] and "test/linear_probe/top1" in found["plain"]
    assert (tmp_path / "runs" / "feature_cache").is_dir()


def test_a_train_run_resumes_whatever_the_cache(tiny_config, tmp_path):
    """The folder of the features may change between a run and its continuation."""
    options = ["--config", str(tiny_config), BOTH, f"output_dir={tmp_path}", "name=run"]
    main_of("train")([*options, "trainer.max_epochs=1"])
    first = results(tmp_path / "run")["metrics"]
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "feature_cache")
    main_of("train")([*options, "trainer.max_epochs=1", "data.feature_cache=null"])
    assert results(tmp_path / "run")["metrics"] == first and not list(tmp_path.glob("run.*"))
