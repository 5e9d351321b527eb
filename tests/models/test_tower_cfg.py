import dataclasses
from typing import Any

import open_clip
import open_clip.model
import pytest

from cliplab.errors import UserError
from cliplab.models.tower_cfg import CLIPTextCfg, CLIPVisionCfg, mapping_of, text_cfg_of, vision_cfg_of

NAMES = [name for name in open_clip.list_models() if not name.startswith("coca")]


def test_defaults_are_open_clips() -> None:
    for ours, theirs in ((CLIPVisionCfg, open_clip.model.CLIPVisionCfg), (CLIPTextCfg, open_clip.model.CLIPTextCfg)):
        defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
        for field in dataclasses.fields(ours):
            if field.name == "timm_kwargs":
                continue  # ours alone
            expected = False if field.name == "hf_model_pretrained" else defaults[field.name]
            assert field.default == expected, field.name


@pytest.mark.parametrize("section", ["vision_cfg", "text_cfg"])
def test_every_config_of_open_clip_is_read_and_written_unchanged(section: str) -> None:
    """Written, an option that is open_clip's default may be left out; nothing else."""
    read, schema = (
        (vision_cfg_of, open_clip.model.CLIPVisionCfg)
        if section == "vision_cfg"
        else (text_cfg_of, open_clip.model.CLIPTextCfg)
    )
    for name in NAMES:
        given = open_clip.get_model_config(name)[section]
        cfg = read(given)
        assert read(cfg) == cfg
        written = mapping_of(cfg)
        assert read(written) == cfg, name
        their_given, their_written = schema(**given), schema(**written)
        for field in dataclasses.fields(schema):
            one, other = getattr(their_given, field.name), getattr(their_written, field.name)
            if field.name in dataclasses.asdict(cfg) and one is not None and field.name != "hf_model_pretrained":
                assert (list(one) if isinstance(one, tuple) else one) == other, (name, field.name)


def test_what_is_written_states_the_sizes() -> None:
    assert mapping_of(CLIPVisionCfg()) == {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    assert mapping_of(CLIPVisionCfg(timm_model_name="x")) == {"image_size": 224, "timm_model_name": "x"}
    resnet = mapping_of(CLIPVisionCfg(layers=(3, 4, 6, 3), width=64))
    assert resnet == {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    assert mapping_of(CLIPTextCfg()) == text
    assert mapping_of(CLIPTextCfg(hf_model_name="x", proj_bias=True)) == {
        "context_length": 77,
        "vocab_size": 49408,
        "hf_model_name": "x",
        "proj_bias": True,
    }


def test_lists_become_tuples_and_back() -> None:
    cfg = vision_cfg_of({"image_size": [224, 336], "layers": [1, 1, 1, 1]})
    assert (cfg.image_size, cfg.layers) == ((224, 336), (1, 1, 1, 1))
    assert mapping_of(cfg)["image_size"] == [224, 336]


def test_null_is_open_clips_default() -> None:
    assert vision_cfg_of({"mlp_ratio": None, "ls_init_value": None}) == CLIPVisionCfg()
    assert vision_cfg_of({"timm_proj": None, "timm_model_name": "x"}).timm_proj is None
    assert text_cfg_of({"hf_proj_type": None, "hf_pooler_type": None}).hf_proj_type is None


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("vision_cfg", {"layer": 3}, "vision_cfg has no option 'layer': did you mean 'layers'"),
        ("text_cfg", {"context": 3}, "text_cfg has no option 'context': "),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool=True: .*CoCa"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "pos_embed_type='sin_cos_2d'"),
        ("vision_cfg", {"qk_norm": True}, "qk_norm=True"),
        ("text_cfg", {"embed_cls": True}, "embed_cls=True"),
        ("text_cfg", {"block_type": "custom"}, "block_type='custom'"),
        ("vision_cfg", {"pool_type": "mean"}, "vision_cfg.pool_type must be one of tok, avg, none, got 'mean'"),
        (
            "vision_cfg",
            {"timm_proj": "linea"},
            "vision_cfg.timm_proj must be one of linear, mlp, none, '', got 'linea'",
        ),
        (
            "text_cfg",
            {"pool_type": "eot"},
            "text_cfg.pool_type must be one of argmax, eos, first, last, none, got 'eot'",
        ),
        ("text_cfg", {"proj_type": "mlp"}, "text_cfg.proj_type must be one of linear, none, got 'mlp'"),
        ("vision_cfg", {"image_size": 0}, "sizes must be 1 or more"),
        ("vision_cfg", {"image_size": [32, -1]}, "sizes must be 1 or more"),
        ("vision_cfg", {"image_size": 15}, "image_size 15 is smaller than a patch of 16"),
        ("text_cfg", {"vocab_size": 0}, "sizes must be 1 or more"),
        ("text_cfg", {"heads": 0}, "sizes must be 1 or more"),
    ],
    ids=str,
)
def test_options_that_can_not_be_are_named(section: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        (vision_cfg_of if section == "vision_cfg" else text_cfg_of)(options)
    assert section in str(error.value)


def test_spelled_out_defaults_of_what_is_not_built_are_accepted() -> None:
    options = {"attentional_pool": False, "attn_pooler_queries": 256, "attn_pooler_heads": 8, "output_tokens": False}
    assert vision_cfg_of(options) == CLIPVisionCfg()
    assert text_cfg_of({"embed_cls": False, "pad_id": 0, "block_type": None, "output_tokens": False}) == CLIPTextCfg()
