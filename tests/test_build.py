import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from cliplab import build, sources
from cliplab.config import load_config
from cliplab.errors import UserError
from cliplab.run import run_directory
from tests.conftest import ROOT, TINY
from tests.image_folders import make_image_folder


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads_and_names_parts_that_exist(path: Path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"--config configs/{path.name}" in header[1], "the second line of the header is the command"
    config = load_config(path)
    build.check_parts(config)
    assert config.name == path.stem


def test_weights_bring_their_activation_and_a_checkpoint_keeps_it(tiny_config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    oracle = open_clip.CLIP(**TINY, quick_gelu=True)
    torch.save(oracle.state_dict(), tmp_path / "w.pt")
    config = load_config(tiny_config, [f"model.weights={tmp_path / 'w.pt'}"])
    read = sources.read_file

    def tagged(path: Path):
        return replace(read(path), quick_gelu=True, preprocess={"mean": (0.5, 0.5, 0.5), "resize_mode": "squash"})

    monkeypatch.setattr(sources, "read_file", tagged)
    model, built_from = build.build_model(config)
    assert built_from.architecture["quick_gelu"] is True
    text = torch.randint(1, 49000, (3, 32))
    torch.testing.assert_close(model.clip.encode_text(text), oracle.encode_text(text), atol=1e-5, rtol=0)
    config.model.weights = None
    again, _ = build.build_model(config, json.loads(json.dumps(vars(built_from))))
    assert again.clip.quick_gelu
    assert again.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert built_from.preprocess["resize_mode"] == "squash"
    again.clip.load_state_dict(model.clip.state_dict(), strict=True)


def test_the_options_of_the_towers_arrive(tiny_config):
    config = load_config(tiny_config, ["model.image_size=48", "model.attention=eager"])
    model, built_from = build.build_model(config)
    assert built_from.architecture["vision_cfg"]["image_size"] == built_from.preprocess["size"] == 48
    assert model.clip.visual.positional_embedding.shape == (1 + 6 * 6, 32)
    used = {m.attention_implementation for m in model.modules() if hasattr(m, "attention_implementation")}
    assert used == {"eager"}


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_recomputed_where_that_is_asked(tiny_config, asked: bool):
    model, _ = build.build_model(load_config(tiny_config, [f"model.grad_checkpointing={asked}"]))
    assert {m.grad_checkpointing for m in model.modules() if hasattr(m, "grad_checkpointing")} == {asked}


def test_blocks_are_compiled_where_that_is_asked(tiny_config, monkeypatch):
    asked = []
    monkeypatch.setattr(build, "compile_blocks", lambda *given: asked.append(given))
    model, _ = build.build_model(load_config(tiny_config, ["model.compile=true", "trainer.accelerator=cpu"]))
    assert asked == [(model.clip, "cpu")]
    build.build_model(load_config(tiny_config))
    assert len(asked) == 1


def test_protocols_belong_to_data_sets(tiny_config):
    config = load_config(tiny_config, ["data.protocol=clip_benchmark"])
    with pytest.raises(UserError, match="none of data.name=wardrobe"):
        build.build_protocol(config)
    config = load_config(tiny_config, ["data.protocol.gallery=val_split"])
    assert build.build_protocol(config).name == "clip4cir (gallery=val_split)"


def test_towers_that_are_not_built_are_named(tiny_config):
    config = load_config(tiny_config, ["model.arch=coca_ViT-B-32"])
    with pytest.raises(UserError, match="coca_ViT-B-32: CoCa .multimodal_cfg. isn't built here"):
        build.build_model(config)


def test_the_loss_gets_its_options(tiny_config):
    config = load_config(tiny_config, ["loss={name: info_nce, symmetric: false}"])
    model, built_from = build.build_model(config)
    module = build.build_module(config, model, built_from)
    query, target = torch.randn(4, 16), torch.randn(4, 16)
    logits = query @ target.T
    expected = -logits.log_softmax(dim=1).diagonal().mean()
    torch.testing.assert_close(module.loss(query, target, torch.tensor(1.0), model.score), expected)


def test_classification_while_training_is_checked_first(tiny_config, tmp_path):
    root = make_image_folder(tmp_path / "pictures")
    given = [f"zero_shot.root={root}", "zero_shot.every_n_epochs=1"]
    build.check(load_config(tiny_config, given))
    for key, value, message in (
        ("zero_shot.root", tmp_path / "nowhere", r"no folder .*nowhere \(data.root or zero_shot.root\)"),
        ("zero_shot.protocol", "zero_shot_cifr", "did you mean 'zero_shot_cifar'"),
        ("zero_shot.protocol", "clip4cir", "'clip4cir' is none of zero_shot.protocol: there is: zero_shot_imagenet"),
    ):
        with pytest.raises(UserError, match=message):
            build.check(load_config(tiny_config, [*given, f"{key}={value}"]))
    (root / "test" / "dress" / "test0.png").write_text("no picture")
    with pytest.raises(UserError, match="can't read the image .*test0.png"):
        build.check(load_config(tiny_config, given))
    build.check(load_config(tiny_config, given), train=False)  # nothing is trained, nothing is classified
    build.check(load_config(tiny_config, given[:1]))
    flat = make_image_folder(tmp_path / "flat", {"": (1, 1)})
    with pytest.raises(UserError, match="has no split 'val'"):
        build.check(load_config(tiny_config, [f"zero_shot.root={flat}", given[1], "zero_shot.split=val"]))


def test_a_probe_needs_classes_and_splits(tiny_config, tmp_path):
    with pytest.raises(UserError, match="linear_probe=true needs classes: data.name=image_folder, not wardrobe"):
        build.check(load_config(tiny_config, ["linear_probe=true"]))
    flat = make_image_folder(tmp_path / "flat", {"": (1, 1)})
    given = ["data.name=image_folder", f"data.root={flat}"]
    build.check(load_config(tiny_config, given), train=False)
    with pytest.raises(UserError, match="linear_probe=true needs pictures to fit, choose and test on"):
        build.check(load_config(tiny_config, [*given, "linear_probe=true"]), train=False)


def test_equal_targets_are_kept_apart_for_captions_alone(tiny_config):
    for name, given, expected in (
        ("wardrobe", [], "ignore"),
        ("wardrobe_captions", [], "separate"),
        ("flickr30k", ["data.same_image=positives"], "positives"),
        ("wardrobe", ["data.same_image=separate"], "separate"),
    ):
        config = load_config(tiny_config, [f"data.name={name}", *given])
        assert build.same_image(config) == expected
        model, built_from = build.build_model(config)
        assert build.build_module(config, model, built_from).positives == (expected == "positives")
        if name != "flickr30k":
            datamodule = build.build_datamodule(config, build.build_dataset(config), model, built_from)
            assert datamodule.separate == (expected == "separate")


def test_positives_need_a_loss_that_knows_them(tiny_config, monkeypatch):
    monkeypatch.setitem(build.LOSSES, "plain", lambda query, target, scale, score: query.sum())
    config = load_config(tiny_config, ["loss=plain", "data.same_image=positives"])
    with pytest.raises(UserError, match="same_image=positives: the loss plain has one positive a query; use info_nce"):
        build.check_parts(config)
    build.check_parts(load_config(tiny_config, ["loss=plain"]))


def test_the_captions_of_a_data_set_can_be_named(tiny_config, tmp_path):
    config = load_config(tiny_config, ["data.name=coco", f"data.root={tmp_path}", "data.annotations=captions.json"])
    with pytest.raises(UserError, match="^data.annotations=captions.json: no such file"):
        build.check(config)
    config = load_config(tiny_config, ["data.annotations=captions.json"])
    with pytest.raises(UserError, match="data.annotations=captions.json: data.name=wardrobe has files of fixed names"):
        build.check(config)


def test_under_slurm_lightning_requeues_nothing(tiny_config, tmp_path, monkeypatch):
    for key, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    config = load_config(tiny_config, [f"output_dir={tmp_path}"])
    trainer = build.build_evaluator(config, run_directory(config))
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    monkeypatch.delenv("SLURM_NTASKS")
    trainer = build.build_evaluator(config, run_directory(config))
    assert not isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)
