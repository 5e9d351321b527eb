import pickle
from pathlib import Path
from typing import Any

import open_clip.model
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.checkpoints.weights import fitted, load_strictly, read_file, read_state_dict
from cliplab.models.clip import CLIP, build_clip
from tests.oracles import open_clip_model

CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Weights that open_clip's own class has made."""
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


class TestReadStateDict:
    def test_safetensors(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        save_file(state, tmp_path / "weights.safetensors")
        assert same(read_state_dict(tmp_path / "weights.safetensors"), state)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_torch_files_new_and_old(self, state: dict[str, Tensor], tmp_path: Path, zipped: bool) -> None:
        torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
        assert same(read_state_dict(tmp_path / "weights.pt"), state)

    def test_the_wrapper_of_open_clips_trainer(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        wrapped = {"epoch": 3, "name": "run", "state_dict": prefixed(state, "module."), "optimizer": {"state": {}}}
        torch.save(wrapped, tmp_path / "epoch_3.pt")
        assert same(read_state_dict(tmp_path / "epoch_3.pt"), state)

    def test_the_prefix_of_distributed_training(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        save_file(prefixed(state, "module."), tmp_path / "weights.safetensors")
        assert same(read_state_dict(tmp_path / "weights.safetensors"), state)

    def test_the_towers_of_a_runs_checkpoint(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        weights = prefixed(state, "model.clip.") | {"model.composer.weights": torch.ones(2)}
        torch.save({"state_dict": weights, "hyper_parameters": {"config": {"seed": 0}}}, tmp_path / "best.ckpt")
        assert same(read_state_dict(tmp_path / "best.ckpt"), state)

    @pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
    def test_a_file_that_is_cut_off_anywhere_is_named(
        self, state: dict[str, Tensor], tmp_path: Path, form: str
    ) -> None:
        file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
        if form == "safetensors":
            save_file(state, file)
        else:
            torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
        content = file.read_bytes()
        for length in (*range(0, 4000, 53), len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            with pytest.raises(UserError, match="can't read") as error:
                read_state_dict(file)
            assert str(file) in str(error.value), length

    def test_pickled_code_is_refused_and_not_run(self, tmp_path: Path) -> None:
        trace, file = tmp_path / "trace", tmp_path / "weights.pt"

        class Code:
            def __reduce__(self) -> Any:
                return Path.touch, (trace,)

        torch.save({"state_dict": {"weight": torch.ones(1)}, "extra": Code()}, file)
        with pytest.raises(UserError, match="pickled code, which is never run") as error:
            read_state_dict(file)
        assert str(file) in str(error.value)
        file.write_bytes(pickle.dumps(Code(), protocol=2))
        with pytest.raises(UserError):
            read_state_dict(file)
        assert not trace.exists()
        pickle.loads(file.read_bytes())
        assert trace.exists(), "else the file above would prove nothing"

    @pytest.mark.parametrize("content", [[torch.ones(1)], {"weight": 3}, torch.ones(2), {"state_dict": [1]}])
    def test_something_else_is_named(self, tmp_path: Path, content: Any) -> None:
        file = tmp_path / "weights.pt"
        torch.save(content, file)
        with pytest.raises(UserError, match="holds no state dict") as error:
            read_state_dict(file)
        assert str(file) in str(error.value)

    def test_a_web_page_in_place_of_weights_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "weights.bin"
        file.write_text("<!DOCTYPE html><html><body>404</body></html>")
        with pytest.raises(UserError, match="damaged") as error:
            read_state_dict(file)
        assert str(file) in str(error.value)


class TestReadFile:
    def test_a_file_knows_no_activation_and_no_preprocessing(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        file = tmp_path / "weights.safetensors"
        save_file(state, file)
        weights = read_file(file)
        assert (weights.source, weights.quick_gelu, weights.preprocess) == (str(file), None, {})
        assert same(dict(weights.state_dict), state)

    def test_openais_numbers_tell_its_activation(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        numbers = {key: torch.tensor(8) for key in ("input_resolution", "context_length", "vocab_size")}
        torch.save(state | numbers, tmp_path / "weights.pt")
        weights = read_file(tmp_path / "weights.pt")
        assert weights.quick_gelu is True and same(dict(weights.state_dict), state)

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "model.clip.", "_orig_mod.module.", "module._orig_mod."]
    )
    @pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
    def test_wrappers_and_prefixes(
        self, state: dict[str, Tensor], tmp_path: Path, prefix: str, wrapper: str | None
    ) -> None:
        content = prefixed(state, prefix)
        torch.save({wrapper: content, "epoch": 1} if wrapper else content, tmp_path / "weights.pt")
        assert same(dict(read_file(tmp_path / "weights.pt").state_dict), state)

    def test_another_lightning_modules_checkpoint(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        content = prefixed(state, "model.") | {"loss.weight": torch.ones(1)}
        torch.save({"state_dict": content}, tmp_path / "last.ckpt")
        assert same(dict(read_file(tmp_path / "last.ckpt").state_dict), state)

    def test_an_empty_state_dict_is_named(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "weights.pt")
        with pytest.raises(UserError, match=r"weights\.pt holds an empty state dict"):
            read_file(tmp_path / "weights.pt")


class TestFitted:
    """A state dict of one layout for a model of another."""

    def model(self, custom: bool = False, **options: Any) -> Any:
        with torch.device("cpu"):
            return build_clip({**CONFIG, **options, "custom_text": custom})

    @pytest.mark.parametrize("custom", [False, True])
    def test_text_keys_with_and_without_their_prefix(self, state: dict[str, Tensor], custom: bool) -> None:
        nested = self.model(custom=True)
        nested.load_state_dict({k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in state.items()})
        model = self.model(custom)
        for given in (state, nested.state_dict()):
            load_strictly(model, given, "weights.pt")
            assert same(model.state_dict(), nested.state_dict() if custom else state)

    @pytest.mark.parametrize("nonscalar", [False, True])
    def test_scalars_of_one_element(self, state: dict[str, Tensor], nonscalar: bool) -> None:
        model = self.model(nonscalar_logit_scale=nonscalar, init_logit_bias=-10.0)
        for shape in ([], [1]):
            given = state | {"logit_scale": torch.full(shape, 1.5), "logit_bias": torch.full(shape, -3.0)}
            load_strictly(model, given, "weights.pt")
            assert model.logit_scale.shape == model.logit_bias.shape == ((1,) if nonscalar else ())
            assert (model.logit_scale.item(), model.logit_bias.item()) == (1.5, -3.0)

    def test_a_missing_bias_is_zero_as_in_open_clip(self, state: dict[str, Tensor]) -> None:
        model = self.model(init_logit_bias=-10.0)
        load_strictly(model, state, "weights.pt")
        assert model.logit_bias.item() == 0.0
        with pytest.raises(UserError, match=r"2 keys missing \(logit_bias, logit_scale\)"):
            load_strictly(model, {k: v for k, v in state.items() if k != "logit_scale"}, "weights.pt")

    def test_position_ids_are_left_out(self, state: dict[str, Tensor]) -> None:
        given = state | {"text.embeddings.position_ids": torch.arange(6)}
        assert "text.embeddings.position_ids" not in fitted(self.model(), given)
        load_strictly(self.model(), given, "weights.pt")

    @pytest.mark.parametrize("custom", [False, True])
    def test_positions_of_another_size_are_open_clips(self, state: dict[str, Tensor], custom: bool) -> None:
        config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": 24}, "custom_text": custom}
        config |= {"text_cfg": CONFIG["text_cfg"] | {"context_length": 9}}
        model, theirs = build_clip(config), open_clip_model(config)
        expected = open_clip.model.convert_to_custom_text_state_dict(dict(state)) if custom else dict(state)
        open_clip.model.resize_pos_embed(expected, theirs)
        open_clip.model.resize_text_pos_embed(expected, theirs)
        load_strictly(model, state, "weights.pt")
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all((found[key] - expected[key]).abs().max() <= 1e-6 for key in found)

    def test_nothing_given_is_changed(self, state: dict[str, Tensor]) -> None:
        given = dict(state)
        fitted(self.model(custom=True), given)
        assert same(given, state)


class TestLoadStrictly:
    def test_every_tensor_arrives_in_fp32(self, state: dict[str, Tensor]) -> None:
        model = CLIP(**CONFIG)
        load_strictly(model, {key: value.half() for key, value in state.items()}, "weights.pt")
        expected = {key: value.half().float() for key, value in state.items()}
        assert same(model.state_dict(), expected)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_another_architecture_is_told_apart(self, state: dict[str, Tensor]) -> None:
        model = CLIP(**CONFIG)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        wrong = dict(state)
        wrong["logit_bias"] = torch.zeros(())
        for key in ("ln_final.weight", "ln_final.bias", "visual.proj", "visual.conv1.weight"):
            del wrong[key]
        wrong["text_projection"] = torch.zeros(16, 9)
        with pytest.raises(UserError) as error:
            load_strictly(model, wrong, "weights.pt")
        message = str(error.value)
        assert "weights.pt" in message and "model.arch" in message
        assert "4 keys missing (ln_final.bias, ln_final.weight, visual.conv1.weight, ...)" in message
        assert "1 keys unexpected (logit_bias)" in message
        assert "text_projection: (16, 9) in the file, (16, 8) in the model" in message
        assert same(model.state_dict(), before), "a refused file changes nothing"
