import pytest
import torch

from cliplab import build
from cliplab.config import load_config
from cliplab.errors import UserError
from cliplab.models.lora import LowRank


def count(model: torch.nn.Module) -> int:
    return sum(isinstance(module, LowRank) for module in model.modules())


def test_lora_freezes_its_towers_and_leaves_the_rest_to_freeze(tiny_config):
    model, built_from = build.build_model(load_config(tiny_config, ["model.lora={rank: 2, alpha: 4}"]))
    assert count(model.clip.visual) == 1 and count(model) == 2
    groups = {group.name: group for group in build.build_module(load_config(tiny_config), model, built_from).groups()}
    sizes = {name: sum(parameter.numel() for parameter in group.parameters) for name, group in groups.items()}
    assert sizes["image_encoder"] == 2 * 3 * 2 * 32 and sizes["text_encoder"] == 2 * 3 * 2 * 16
    assert sizes["composer"] > 1000 and sizes["temperature/no_decay"] == 1
    assert sum(map(len, model.part_parameters().values())) == len(list(model.parameters()))
    scalings = {float(module.scaling) for module in model.modules() if isinstance(module, LowRank)}
    assert scalings == {2.0}


def test_one_tower_alone_and_some_rows(tiny_config):
    given = ["model.lora={rank: 2, parts: [text_encoder], targets: [q, v]}", "model.freeze=[image_encoder]"]
    model, _ = build.build_model(load_config(tiny_config, given))
    (update,) = (module for module in model.modules() if isinstance(module, LowRank))
    assert update.rows.tolist() == [0, 2] and count(model.clip.visual) == 0
    assert not any(parameter.requires_grad for parameter in model.clip.visual.parameters())


def test_without_lora_there_is_none(tiny_config):
    model, _ = build.build_model(load_config(tiny_config))
    assert count(model) == 0 and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.lora={rank: 2, parts: [image_encodr]}", r"model\.lora\.parts: unknown 'image_encodr': did you mean"),
        ("model.lora={rank: 2, targets: [w]}", r"model\.lora\.targets: unknown 'w': .*q, v"),
        ("model.lora={rank: 2, targets: []}", r"model\.lora\.targets must name one or more"),
        ("model.lora={rank: 2, targets: [q, q]}", r"each once"),
        ("model.lora.rank=-1", r"model\.lora\.rank must be 0 or more"),
        ("model.lora={rank: 2, alpha: 0}", r"model\.lora\.alpha must be a finite number above 0"),
    ],
)
def test_mistakes_name_the_key(tiny_config, given, said):
    with pytest.raises(UserError, match=said):
        build.check_parts(load_config(tiny_config, [given]))


def test_a_tower_is_frozen_or_adapted(tiny_config):
    given = ["model.lora.rank=2", "model.freeze=[text_encoder]"]
    with pytest.raises(UserError, match=r"model\.freeze and model\.lora\.parts both name text_encoder"):
        build.check_parts(load_config(tiny_config, given))
    build.check_parts(load_config(tiny_config, given[1:]))


def test_the_feature_cache_keeps_nothing_of_an_adapted_tower(tiny_config):
    config = load_config(tiny_config, ["model.lora={rank: 2, parts: [image_encoder]}", "model.freeze=[text_encoder]"])
    model, built_from = build.build_model(config)
    datamodule = build.build_datamodule(config, build.build_dataset(config), model, built_from)
    assert datamodule.features.towers == ["text"]


def test_batch_norms_keep_their_statistics(tiny_config, tmp_path):
    import json

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "rn.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    for frozen in (True, False):
        config = load_config(tiny_config, [f"model.arch={tmp_path / 'rn.json'}", f"model.freeze_bn={frozen}"])
        model, _ = build.build_model(config)
        model.train()
        before = model.clip.visual.bn1.running_mean.clone()
        model.clip.encode_image(torch.randn(2, 3, 32, 32)).sum().backward()
        assert torch.equal(model.clip.visual.bn1.running_mean, before) == frozen
        assert model.clip.visual.bn1.weight.grad is not None
