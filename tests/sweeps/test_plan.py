from pathlib import Path

import pytest

from cliplab.errors import UserError
from cliplab.sweeps.plan import make_plan
from cliplab.sweeps.spec import load_spec
from tests.conftest import ROOT

BASE = f"config: {ROOT / 'configs/quickstart.yaml'}\ncolumns: {{R@10: test/mean/R@10}}\n"


@pytest.fixture
def plan(tmp_path):
    def make(text, *arguments):
        path = tmp_path / "exp.yaml"
        path.write_text(BASE + text)
        return make_plan(load_spec(path, [f"output_dir={tmp_path / 'out'}", *arguments]))

    return make


def test_a_row_is_a_run_per_seed_with_its_whole_config(plan, tmp_path):
    found = plan("seeds: [3, 4]\nruns: {base: {}, my tirg: {model.composer: tirg, optim.lr: 1.0e-3}}")
    assert [run.title for run in found.runs] == ["base, seed 3", "base, seed 4", "my tirg, seed 3", "my tirg, seed 4"]
    run = found.rows["my tirg"][1]
    assert run.directory == tmp_path / "out" / "exp" / "my_tirg" / "seed-4"
    assert (run.config.model.composer, run.config.optim.lr, run.config.seed) == ({"name": "tirg"}, 1e-3, 4)
    assert found.rows["base"][0].config.model.composer == {"name": "combiner", "dropout": 0.1}
    assert (run.evaluated, run.checkpoint, run.needs) == (False, None, ())


def test_layers_win_in_order_file_overrides_command_line_row(plan):
    text = "overrides: {optim.lr: 1.0, data.batch_size: 1}\nruns: {a: {}, b: {optim.lr: 3.0}}"
    found = plan(text, "optim.lr=2.0")
    assert [found.rows[label][0].config.optim.lr for label in "ab"] == [2.0, 3.0]
    assert found.rows["a"][0].config.data.batch_size == 1


def test_first_runs_are_named_by_their_directory(plan, tmp_path):
    text = """
first: {stage: {model.composer: sum}, other: {config: CONFIG}}
overrides: {model.arch: "{stage}", data.pad: square}
runs: {a: {}, b: {model.weights: "{other}/x.pt"}}
""".replace("CONFIG", str(ROOT / "configs/wardrobe_captions.yaml"))
    found = plan(text, "optim.lr=0.5")
    stage = found.first["stage"]
    assert stage.directory == tmp_path / "out/exp/stage/seed-0"
    assert (stage.config.data.pad, stage.config.optim.lr) == ("none", 0.5), (
        "overrides are for rows, what is typed for all"
    )
    assert found.first["other"].config.data.name == "wardrobe_captions"
    assert found.rows["a"][0].config.model.arch == str(stage.directory)
    assert found.rows["a"][0].needs == (stage,)
    assert found.rows["b"][0].needs == (stage, found.first["other"])
    assert found.rows["b"][0].config.model.weights == f"{found.first['other'].directory}/x.pt"
    assert [run.label for run in found.runs] == ["stage", "other", "a", "b"]


def test_what_is_evaluated_runs_once_with_the_model_of_the_checkpoint(plan):
    found = plan("""
seeds: [0, 1]
first: {stage: {model.composer: tirg, model.weights: openai}}
runs: {a: {}, b: {data.protocol: val}, c: {}}
evaluate: [a, b]
checkpoint: "{stage}"
""")
    assert [len(found.rows[label]) for label in "abc"] == [1, 1, 2]
    row = found.rows["b"][0]
    assert row.evaluated and row.checkpoint == str(found.first["stage"].directory)
    assert row.config.model.composer == {"name": "tirg"} and row.config.model.weights is None
    assert found.rows["c"][0].config.model.composer["name"] == "combiner"


def test_each_row_may_measure_its_own_checkpoint(plan):
    found = plan("""
seeds: [0, 1]
first: {words: {model.composer: tirg}, other: {model.composer: film, model.arch: ViT-B-32}}
runs: {a: {}, b: {data.protocol: val}, c: {}, d: {}}
evaluate: [a, b, c]
checkpoint: {a: "{words}", b: "{other}"}
""")
    rows = {label: runs[0] for label, runs in found.rows.items()}
    measured = {label: Path(row.checkpoint).parent.name for label, row in rows.items() if row.checkpoint}
    assert measured == {"a": "words", "b": "other"}
    assert [rows[label].config.model.composer["name"] for label in "abc"] == ["tirg", "film", "combiner"]
    assert rows["b"].config.model.arch == "ViT-B-32" and rows["a"].needs == (found.first["words"],)
    assert rows["c"].evaluated and rows["c"].needs == () and not rows["d"].evaluated


def test_a_file_of_a_first_run_brings_its_model_and_what_is_typed_wins(plan):
    text = "first: {words: {model.composer: tirg}}\nruns: {a: {}}\nevaluate: true\noverrides: {model.composer: film}"
    (row,) = plan(f"{text}\ncheckpoint: '{{words}}/checkpoints/last.ckpt'", "model.attention=eager").rows["a"]
    assert row.config.model.composer == {"name": "tirg"} and row.config.model.attention == "eager"
    assert row.checkpoint.endswith("words/seed-0/checkpoints/last.ckpt")


def test_a_long_label_is_a_folder_that_file_systems_take(plan):
    long = ["x" * 300 + end for end in "ab"]
    folders = [plan(f"runs: {{{label}: {{}}}}").rows[label][0].directory.parent.name for label in long]
    assert all(len(name) <= 150 and name.startswith("xxx") for name in folders) and len(set(folders)) == 2


def test_a_protocol_s_prompt_is_no_place(plan):
    found = plan('first: {s: {}}\nruns: {a: {data.protocol: {name: clip4cir, prompt: "a photo of {}"}}}')
    assert found.rows["a"][0].config.data.protocol["prompt"] == "a photo of {}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: {a: {optim.lrr: 1}}", "runs.a: unknown key 'optim.lrr': did you mean 'optim.lr'"),
        ("runs: {a: {optim.lr: fast}}", "optim.lr"),
        ("overrides: {optim.lrr: 1}\nruns: {a: {}}", "overrides: unknown key"),
        ("first: {stage: {}}\nruns: {a: {model.arch: '{stag}'}}", "did you mean 'stage'"),
        ("runs: {a: {model.arch: '{stage}'}}", "there is no `first` run before it"),
        ("first: {x: {model.arch: '{y}'}, y: {}}\nruns: {a: {}}", "there is no `first` run before it"),
        ("runs: {a: {}, b: {}}", "the rows 'a' and 'b' are the same run"),
        ("runs: {a: {optim.lr: 1}, b: {optim: {lr: 1.0}}}", "the rows 'a' and 'b' are the same run"),
        ("runs: {a: {data.num_workers: 3}}", "'a' changes nothing: data.num_workers=3 changes no number"),
        ("runs: {a: {model.composer.dropout: 0.1}}", "'a' changes nothing"),
        ("runs: {a: {data.protocol: clip4cir}}", "'a' changes nothing"),
        ("evaluate: true\nruns: {a: {}, b: {optim.lr: 1}}", "the rows 'a' and 'b' are the same run"),
        ("runs: {a: {}}\npublished: {a: TIRG}", "nothing is published for data.name=wardrobe"),
        ("overrides: {data.name: fashioniq}\nruns: {a: {}}\npublished: {a: SERLE}", "did you mean 'SEARLE'"),
        ("overrides: {data.name: fashioniq}\nruns: {a: {}}\npublished: {a: 'SEARLE [ViT]'}", "did you mean 'SEARLE ["),
        ("runs: {'..': {}}", "'..' can't be a label"),
        ("runs: {'': {}, '.': {}}", "'' can't be a label"),
        ("runs: {a: {data.protocol: nonsense}}", "exp.yaml: runs.a: unknown protocol"),
        ("first: {s: {data.name: wardorbe}}\nruns: {a: {}}", "exp.yaml: first.s: unknown data set"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_before_anything_runs(plan, text, said):
    with pytest.raises(UserError) as caught:
        plan(text)
    assert said in str(caught.value)


def test_a_missing_base_lists_what_there_is(tmp_path):
    path = tmp_path / "exp.yaml"
    path.write_text("config: nothing.yaml\nruns: {a: {}}\ncolumns: {a: b}\n")
    with pytest.raises(UserError, match="no config file nothing.yaml"):
        make_plan(load_spec(path))


def test_a_grid_may_hold_the_value_of_the_base(plan):
    assert len(plan("grid: {optim.lr: [5.0e-4, 1.0e-3]}").rows) == 2


def test_published_rows_are_found_by_method_and_by_backbone(plan):
    text = "overrides: {data.name: fashioniq}\nruns: {a: {}}\npublished: {a: 'SEARLE'}"
    assert {row.method for row in plan(text).published["a"]} == {"SEARLE"} and len(plan(text).published["a"]) == 2
    assert len(plan(text.replace("SEARLE", "SEARLE [CLIP ViT-B/32]")).published["a"]) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_that_we_ship_can_be_meant(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert make_plan(load_spec(path)).runs
    assert path.name in (ROOT / "experiments/README.md").read_text()
