import json
from dataclasses import asdict

import pytest

from cliplab.build import build_protocol
from cliplab.config import load_config
from cliplab.sweeps import identity
from cliplab.sweeps.identity import Here, differences, digest, identity_in, identity_of, numbers_of
from tests.conftest import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
VERSIONS = {"python": "3.11.1", "torch": "2.14.0"}


def of(*overrides, evaluated=False, data="d", versions=VERSIONS):
    return identity_of(load_config(QUICKSTART, overrides), evaluated, data, versions)


@pytest.mark.parametrize(
    ("override", "evaluated_too"),
    [
        ("optim.lr=1e-3", False),
        ("trainer.max_epochs=5", False),
        ("trainer.max_steps=5", False),
        ("loss.symmetric=false", False),
        ("data.batch_size=3", False),
        ("data.flip=true", False),
        ("trainer.weight_averaging=ema", False),
        ("teacher.arch=runs/x", False),
        ("data.hard_negatives=2", False),
        ("model.fixed_scale=50", False),
        ("model.freeze=[composer]", False),
        ("data.protocol.train_join=each_caption", False),
        ("seed=1", True),
        ("model.composer.dropout=0.2", True),
        ("data.protocol=searle", True),
        ("data.protocol.ties=mean", True),
        ("data.pad=square", True),
        ("trainer.precision=bf16-mixed", True),
    ],
)
def test_what_changes_numbers_of_a_training_and_of_an_evaluation(override, evaluated_too):
    assert differences(of(), of(override))
    assert bool(differences(of(evaluated=True), of(override, evaluated=True))) == evaluated_too or (
        override.startswith("data.protocol.train_join")
    )


@pytest.mark.parametrize("override", ["name=x", "output_dir=y", "debug=true", "data.num_workers=7", "resume=never"])
def test_what_changes_none(override):
    assert differences(of(), of(override)) == []


def test_the_default_protocol_is_the_same_under_its_name():
    assert differences(of(), of("data.protocol=clip4cir")) == []


def test_data_and_packages_count_and_python_itself_does_not():
    assert differences(of(), of(data="e")) == ["data"]
    assert differences(of(), of(versions={**VERSIONS, "torch": "2.14.1"})) == ["versions.torch"]
    assert differences(of(), of(versions={**VERSIONS, "python": "3.11.2"})) == []
    assert differences(of(), of(evaluated=True))[0] == "data.batch_size"


def told_by(*overrides):
    """What a results.json of such a run holds."""
    config = load_config(QUICKSTART, overrides)
    protocol = {**build_protocol(config).as_dict(), "split": "val"}
    content = {"config": asdict(config), "protocol": protocol, "versions": VERSIONS, "data": {"manifest_hash": "d"}}
    return json.loads(json.dumps(content))


def test_results_tell_the_identity_of_their_run():
    overrides = ["optim.lr=1e-3", "data.protocol.recall_at=[1,5]"]
    content = told_by(*overrides)
    assert differences(identity_in(content, False), of(*overrides)) == []
    content["config"]["optim"]["lrr"] = 1
    content["protocol"]["ties"] = "mean"
    content["config"]["model"]["composer"]["name"] = "tirg"
    assert differences(identity_in(content, False), of(*overrides)) == [
        *("data.protocol.ties", "model.composer.name", "optim.lrr")
    ]


@pytest.mark.parametrize("key", ["data.image_backend", "model.lora", "trainer.weight_averaging", "teacher"])
def test_results_of_an_earlier_version_lack_keys_that_have_defaults_now(key):
    content = told_by()
    *sections, last = key.split(".")
    node = content["config"]
    for section in sections:
        node = node[section]
    del node[last]
    assert differences(identity_in(content, False), of()) == []


def test_the_digest_follows_the_content_and_not_its_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_data_set_is_looked_at_once_and_told_apart_by_its_bytes(tiny_config, monkeypatch, tmp_path, small_wardrobe):
    calls = []
    real = identity.build_dataset
    monkeypatch.setattr(identity, "build_dataset", lambda config: calls.append(1) or real(config))
    here, config = Here(), load_config(tiny_config)
    first = here.identity_of(config, False)
    assert here.identity_of(load_config(tiny_config, ["optim.lr=7"]), False)["data"] == first["data"]
    assert len(calls) == 1
    copy = tmp_path / "wardrobe"
    copy.mkdir()
    for path in small_wardrobe.iterdir():
        (copy / path.name).symlink_to(path)
    file = copy / "captions"
    file.unlink()
    file.mkdir()
    for path in (small_wardrobe / "captions").iterdir():
        (file / path.name).write_text(path.read_text().replace("is", "was", 1))
    assert here.identity_of(load_config(tiny_config, [f"data.root={copy}"]), False)["data"] != first["data"]


def test_numbers_are_as_they_are_read_back_from_json():
    assert numbers_of(load_config(QUICKSTART), False)["optim.betas"] == [0.9, 0.98]
    assert numbers_of(load_config(QUICKSTART), False)["data.protocol.recall_at"] == [10, 50]
