import json
from pathlib import Path

import open_clip
import pytest
import torch

from cliplab import build
from cliplab.config import load_config
from cliplab.errors import UserError
from tests.conftest import ROOT, TINY


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
    read = build.read_weights

    def tagged(arch: str, weights: str):
        found = read(arch, weights)
        return type(found)(found.source, found.state_dict, True, {"mean": (0.5, 0.5, 0.5), "resize_mode": "squash"})

    monkeypatch.setattr(build, "read_weights", tagged)
    model, built_from = build.build_model(config)
    assert built_from.architecture["quick_gelu"] is True
    text = torch.randint(1, 49000, (3, 32))
    torch.testing.assert_close(model.clip.encode_text(text), oracle.encode_text(text), atol=1e-5, rtol=0)
    config.model.weights = None
    again, _ = build.build_model(config, json.loads(json.dumps(vars(built_from))))
    assert again.clip.quick_gelu
    assert again.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_protocols_belong_to_data_sets(tiny_config):
    config = load_config(tiny_config, ["data.protocol=clip_benchmark"])
    with pytest.raises(UserError, match="none of data.name=wardrobe"):
        build.build_protocol(config)
    config = load_config(tiny_config, ["data.protocol.gallery=val_split"])
    assert build.build_protocol(config).name == "clip4cir (gallery=val_split)"


def test_towers_that_are_not_built_yet_are_named(tiny_config):
    config = load_config(tiny_config, ["model.arch=RN50"])
    with pytest.raises(UserError, match="RN50"):
        build.build_model(config)


def test_the_loss_gets_its_options(tiny_config):
    config = load_config(tiny_config, ["loss={name: info_nce, symmetric: false}"])
    model, built_from = build.build_model(config)
    module = build.build_module(config, model, built_from)
    query, target = torch.randn(4, 16), torch.randn(4, 16)
    logits = query @ target.T
    expected = -logits.log_softmax(dim=1).diagonal().mean()
    torch.testing.assert_close(module.loss(query, target, torch.tensor(1.0), model.score), expected)
