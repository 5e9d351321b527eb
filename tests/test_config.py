from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cliplab.config import Config, load_config, merge_config, read_overrides
from cliplab.errors import UserError

TIRG = "model: {composer: {name: combiner, hidden_dim: 7}}"


@pytest.fixture
def load(tmp_path: Path):
    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "made.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


def differences(config: Config) -> dict[str, Any]:
    """`section.key` -> value, where it is not the default."""

    def walk(own: dict[str, Any], default: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in own.items():
            if isinstance(default[key], dict) and key in ("model", "data", "optim", "trainer"):
                found |= walk(value, default[key], f"{prefix}{key}.")
            elif value != default[key]:
                found[prefix + key] = value
        return found

    return walk(asdict(config), asdict(Config()), "")


def test_an_empty_file_gives_the_defaults_and_the_name_of_the_file(load) -> None:
    assert differences(load("")) == {"name": "made"}
    assert differences(load("# only a comment")) == {"name": "made"}


def test_the_file_changes_only_what_it_states(load) -> None:
    config = load("name: own\nseed: 3\noptim: {lr: 1e-3}\ntrainer:\n  max_epochs: 4\n  monitor: val/t2i/R@1")
    assert differences(config) == {
        "name": "own",
        "seed": 3,
        "optim.lr": 1e-3,
        "trainer.max_epochs": 4,
        "trainer.monitor": "val/t2i/R@1",
    }


def test_overrides_win_over_the_file_key_by_key(load) -> None:
    config = load("seed: 3\noptim: {lr: 1e-3, eps: 1e-8}", "optim.lr=2e-5", "data.categories=[dress,shirt]", "seed=4")
    assert differences(config) == {
        "name": "made",
        "seed": 4,
        "optim.lr": 2e-5,
        "optim.eps": 1e-8,
        "data.categories": ["dress", "shirt"],
    }


def test_the_last_of_equal_overrides_wins(load) -> None:
    assert load("", "seed=1", "seed=2").seed == 2


def test_a_value_may_hold_an_equals_sign(load) -> None:
    assert load("", "name=a=b").name == "a=b"


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1", 1.0), ("0.5", 0.5), ("1.0e-3", 1e-3)])
def test_numbers_are_read_alike_in_files_and_overrides(load, text: str, value: float) -> None:
    assert load(f"optim: {{lr: {text}}}").optim.lr == load("", f"optim.lr={text}").optim.lr == value
    assert isinstance(load("", f"optim.lr={text}").optim.lr, float)


def test_null_is_none_where_none_is_allowed(load) -> None:
    assert load("trainer: {gradient_clip_val: null}").trainer.gradient_clip_val is None
    assert load(TIRG, "model.composer=null").model.composer is None
    with pytest.raises(UserError, match=r"'optim\.lr'"):
        load("optim: {lr: null}")


def test_one_more_multiplier_keeps_the_others(load) -> None:
    config = load("optim: {lr_multipliers: {composer: 10}}", "optim.lr_multipliers.text_encoder=0.1")
    assert config.optim.lr_multipliers == {"composer": 10.0, "text_encoder": 0.1}


def test_two_loads_share_nothing(load) -> None:
    first = load("")
    first.loss["temperature"] = 1
    first.optim.betas.append(0.0)
    assert (load("").loss, load("").optim.betas) == ({"name": "info_nce"}, [0.9, 0.98])


# Unknown keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optmi: {lr: 1}", "unknown key 'optmi': did you mean 'optim'?"),
        ("trainer: {max_epoch: 1}", "unknown key 'trainer.max_epoch': did you mean 'trainer.max_epochs'?"),
        ("max_epochs: 1", "unknown key 'max_epochs': did you mean 'trainer.max_epochs'?"),
        ("trainer: {qqqq: 1}", "unknown key 'trainer.qqqq': "),
        ("1: 2", "unknown key '1': keys here: name, seed, resume"),
    ],
)
def test_an_unknown_key_of_the_file_has_path_source_and_hint(load, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(text)
    assert str(error.value).startswith(f"{tmp_path / 'made.yaml'}: {message}")


@pytest.mark.parametrize("override", ["optim.lrr=1", "optim.lrr.x=1"])
def test_an_unknown_key_of_the_command_line_says_so(load, override: str) -> None:
    with pytest.raises(UserError, match=r"^command line: unknown key 'optim\.lrr': did you mean 'optim\.lr'\?"):
        load("", override)


@pytest.mark.parametrize("override", ["=1", "optim.=1"])
def test_half_a_key_is_an_unknown_key(load, override: str) -> None:
    with pytest.raises(UserError, match="unknown key"):
        load("", override)


# Wrong types


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=abc", "optim.lr"),
        ("seed=1.5", "seed"),
        ("seed=true", "seed"),
        ("debug=2.5", "debug"),
        ("optim.betas=[0.9,x]", r"optim.betas[1]"),
        ("model.freeze=composer", "model.freeze"),
        ("data.categories=dress", "data.categories"),
        ("optim.lr.x=2", "optim.lr"),
        ("optim.lr_multipliers.composer=fast", "optim.lr_multipliers.composer"),
    ],
)
def test_a_wrong_type_names_key_and_source(load, override: str, key: str) -> None:
    with pytest.raises(UserError) as error:
        load("", override)
    assert str(error.value).startswith("command line: ") and f"key '{key}'" in str(error.value)


@pytest.mark.parametrize("text", ["optim:", "optim: 3", "optim: [1]"])
def test_a_section_must_be_a_mapping(load, text: str) -> None:
    with pytest.raises(UserError, match="key 'optim' must be a mapping, got "):
        load(text)


@pytest.mark.parametrize("text", ["model: {composer: 5}", "model: {composer: [tirg]}", "model: {composer: true}"])
def test_a_part_must_be_a_name_or_a_mapping(load, text: str) -> None:
    with pytest.raises(UserError, match=r"key 'model\.composer' must be a name or a mapping"):
        load(text)


# Parts


def test_a_part_as_a_plain_string_is_its_name(load) -> None:
    assert load("model: {composer: tirg}").model.composer == {"name": "tirg"}
    assert load("", "model.composer=tirg").model.composer == {"name": "tirg"}
    assert load("", "data.protocol=val").data.protocol == {"name": "val"}


def test_an_option_changes_the_part_that_stands_there(load) -> None:
    assert load(TIRG, "model.composer.dropout=0.5").model.composer == {
        "name": "combiner",
        "hidden_dim": 7,
        "dropout": 0.5,
    }
    assert load("", "loss.label_smoothing=0.1").loss == {"name": "info_nce", "label_smoothing": 0.1}


@pytest.mark.parametrize("name", ["model.composer=tirg", "model.composer.name=tirg", "model.composer={name: tirg}"])
def test_naming_a_part_starts_it_afresh(load, name: str) -> None:
    assert load(TIRG, name).model.composer == {"name": "tirg"}


def test_naming_the_same_part_starts_it_afresh_too(load) -> None:
    assert load(TIRG, "model.composer.name=combiner").model.composer == {"name": "combiner"}


@pytest.mark.parametrize("name", ["model.composer=tirg", "model.composer.name=tirg", "model.composer={name: tirg}"])
@pytest.mark.parametrize("name_first", [True, False])
def test_options_go_with_the_name_in_both_orders(load, name: str, name_first: bool) -> None:
    option = "model.composer.hidden_dim=9"
    overrides = (name, option) if name_first else (option, name)
    assert load(TIRG, *overrides).model.composer == {"name": "tirg", "hidden_dim": 9}


def test_a_name_in_a_later_layer_drops_the_options_of_all_earlier_ones() -> None:
    layers = [
        ("a", {"loss": {"name": "x", "one": 1}}),
        ("b", {"loss": {"two": 2}}),
        ("c", {"loss": {"name": "y"}}),
        ("d", {"loss": {"three": 3}}),
    ]
    assert merge_config(layers[:2]).loss == {"name": "x", "one": 1, "two": 2}
    assert merge_config(layers).loss == {"name": "y", "three": 3}


def test_a_colon_without_space_is_explained(load) -> None:
    from cliplab.build import check_parts

    with pytest.raises(UserError, match="space after the colon"):
        check_parts(load("model: {composer: {name:tirg}}"))
    with pytest.raises(UserError, match="space after the colon"):
        check_parts(load("model: {composer: tirg}\nloss: {name:info_nce}"))


def test_a_loss_of_null_is_a_user_error(load) -> None:
    from cliplab.build import check_parts

    with pytest.raises(UserError, match="loss"):
        check_parts(load("model: {composer: tirg}", "loss=null"))


# Files


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "optim:\n  lr: 1\n  lr: 2"])
def test_duplicate_keys_are_refused(load, tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"duplicate key (seed|lr)") as error:
        load(text)
    assert str(error.value).startswith(f"{tmp_path / 'made.yaml'}: line ") and "rename or remove" in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "optim: {lr: 1", "5", "name: x\n\tseed: 1"])
def test_what_is_no_mapping_names_the_file(load, tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as error:
        load(text)
    assert str(tmp_path / "made.yaml") in str(error.value)


def test_an_interpolation_that_leads_nowhere_names_the_file(load, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load("seed: ${nowhere}")
    assert str(tmp_path / "made.yaml") in str(error.value)


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed: 1")
    with pytest.raises(UserError, match="binary.yaml"):
        load_config(tmp_path / "binary.yaml")


def test_a_missing_file_lists_the_configs_beside_it(load, tmp_path: Path) -> None:
    load("")
    (tmp_path / "other.yaml").touch()
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "nothing.yaml")
    expected = f"no config file {tmp_path / 'nothing.yaml'}; configs here: "
    assert str(error.value) == expected + f"{tmp_path / 'made.yaml'}, {tmp_path / 'other.yaml'}"


def test_a_missing_folder_lists_the_folder_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="configs here: none in configs$"):
        load_config("nowhere/nothing.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quick.yaml").touch()
    with pytest.raises(UserError, match=r"configs here: configs/quick\.yaml$"):
        load_config("nowhere/nothing.yaml")


# Overrides


@pytest.mark.parametrize("override", ["optim.lr", "--optim.lr=1", "-x=1", "lr:1", ""])
def test_what_is_not_key_value_is_shown_with_an_example(override: str) -> None:
    with pytest.raises(UserError) as error:
        read_overrides(["seed=1", override])
    assert str(error.value) == f"'{override}' is not an override; write key=value, for example optim.lr=1e-4"


@pytest.mark.parametrize("override", ["seed=[", "seed={a", "seed=${nowhere}"])
def test_an_unreadable_value_names_the_override(override: str) -> None:
    with pytest.raises(UserError) as error:
        read_overrides([override])
    assert override in str(error.value)


def test_overrides_are_plain_builtins() -> None:
    read = read_overrides(["a.b=[1,2]", "a.c={d: x}", "e=null"])
    assert read == {"a": {"b": [1, 2], "c": {"d": "x"}}, "e": None}
    assert {type(read), type(read["a"]), type(read["a"]["b"]), type(read["a"]["c"])} == {dict, list}
