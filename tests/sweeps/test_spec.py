import pytest

from cliplab.errors import UserError
from cliplab.sweeps.spec import folder_name, layers_of, load_spec, rows_of

BASE = "config: configs/quickstart.yaml\ncolumns: {R@10: test/mean/R@10}\n"


@pytest.fixture
def spec(tmp_path):
    def load(text, *arguments):
        path = tmp_path / "exp.yaml"
        path.write_text(BASE + text)
        return load_spec(path, arguments)

    return load


def test_what_is_left_out_has_defaults(spec):
    found = spec("runs: {a: {}}")
    assert (found.name, found.seeds, found.jobs, found.output, found.executor, found.run) == (
        "exp",
        [0],
        1,
        "terminal",
        "local",
        True,
    )
    assert rows_of(found) == {"a": {}}


def test_the_command_line_sets_keys_of_the_sweep_and_of_all_configs(spec):
    found = spec(
        "runs: {a: {}}\nslurm: {timeout_min: 5, mem_gb: 1}", "output=csv", "seeds=[3,4]", "slurm.mem_gb=2", "run=false",
        "data.root=there", "optim.lr=1e-3", "slurm.slurm_partition=main",
    )  # fmt: skip
    assert (found.output, found.seeds, found.run) == ("csv", [3, 4], False)
    assert found.slurm == {"timeout_min": 5, "mem_gb": 2, "slurm_partition": "main"}
    assert found.typed == {"data": {"root": "there"}, "optim": {"lr": 1e-3}}


def test_a_grid_is_every_combination_with_short_labels(spec):
    found = spec("grid: {optim.lr: [1.0e-4, 3.0e-4], model.composer.name: [sum, tirg]}")
    assert list(rows_of(found)) == [
        "lr=0.0001, composer=sum", "lr=0.0001, composer=tirg", "lr=0.0003, composer=sum", "lr=0.0003, composer=tirg",
    ]  # fmt: skip
    assert rows_of(found)["lr=0.0003, composer=sum"] == {"optim.lr": 3e-4, "model.composer.name": "sum"}


def test_a_grid_beside_rows_is_for_each_of_them(spec):
    found = rows_of(spec("runs: {a: {}, b: {data.pad: square}}\ngrid: {optim.lr: [1.0, 2.0]}"))
    assert list(found) == ["a, lr=1", "a, lr=2", "b, lr=1", "b, lr=2"]
    assert found["b, lr=2"] == {"data.pad": "square", "optim.lr": 2.0}


def test_a_part_with_options_and_keys_that_end_alike_have_whole_labels(spec):
    found = rows_of(spec("grid: {model.composer: [{name: combiner, dropout: 0.1}, sum]}"))
    assert list(found) == ["composer=combiner(dropout=0.1)", "composer=sum"]
    assert "model.x=1, data.x=2" in rows_of(spec("grid: {model.x: [1], data.x: [2]}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: {a: {}, a: {}}", "duplicate key a"),
        ("runs: {a b: {}, a_b: {seed: 1}}", "the sweep sets seed"),
        ("runs: {a b: {}, a_b: {}}", "would share the folder a_b"),
        ("first: {a: {}}\nruns: {a: {}}", "'a' and 'a' would share the folder a"),
        ("grid: {optim.lr: [1.0, 1.0]}", "a value is there twice"),
        ("grid: {optim.lr: 1.0}", "grid.optim.lr must be a list"),
        ("", "there are no rows"),
        ("rnus: {a: {}}", "did you mean 'runs'"),
        ("runs: [a]", "'runs' must be a mapping"),
        ("runs: {a: 3}", "runs.a must be a mapping"),
        ("runs: {1: {}}", "put the name 1 in quotes"),
        ("runs: {a: {}}\nseeds: [1, 1]", "seeds must be different"),
        ("runs: {a: {}}\nseeds: 1", "'seeds' must be"),
        ("runs: {a: {}}\njobs: 0", "jobs must be 1 or more"),
        ("runs: {a: {}}\noutput: pdf", "must be one of terminal, markdown, latex, csv, html"),
        ("runs: {abc: {}}\nbaseline: abd", "baseline names no row 'abd': did you mean 'abc'"),
        ("runs: {abc: {}}\npublished: {abd: TIRG}", "published names no row 'abd'"),
        ("runs: {abc: {}}\nevaluate: [abd]", "evaluate names no row 'abd'"),
        ("runs: {a: {}}\ncheckpoint: x", "no row is under `evaluate`"),
        ("runs: {abc: {}}\nevaluate: true\ncheckpoint: {abd: x}", "checkpoint names no row 'abd': did you mean 'abc'"),
        ("runs: {a: {}, b: {}}\nevaluate: [a]\ncheckpoint: {b: x}", "checkpoint.b changes nothing"),
        ("runs: {a: {}}\nevaluate: true\ncheckpoint: [x]", "'checkpoint' must be"),
        ("runs: {a: {name: x}}", "the sweep sets name"),
        ("runs: {a: {on: 2}}", "exp.yaml: runs.a: put the name True in quotes"),
        ("runs: {a: {}}\nfirst: {s: {config: 5}}", "first.s.config must be a file, got 5"),
        ("runs: {a: {}}\npublished: {a: 5}", "published.a must be a published method, got 5"),
        ("runs: {a: {}}\nevaluate: true\ncheckpoint: {1: x}", "checkpoint: put the name 1 in quotes"),
        ("runs: {a: {}}\nevaluate: true\ncheckpoint: {a: 5}", "'checkpoint' must be"),
    ],
)  # fmt: skip
def test_bad_input_names_the_key(spec, text, said):
    with pytest.raises(UserError) as caught:
        spec(text)
    assert said in str(caught.value) and "exp.yaml" in str(caught.value)


def test_one_key_of_a_row_or_of_what_comes_first_can_be_typed(spec):
    text = "first: {words: {data.root: a, optim.lr: 1}}\nruns: {a: {}, a.b: {optim.lr: 2}}\noverrides: {data.pad: none}"
    found = spec(text, "first.words.data.root=b", "runs.a.b.optim.lr=3", "runs.a.seed_of=x", "runs.new={}")
    assert found.first == {"words": {"data.root": "b", "optim.lr": 1}}
    assert found.runs == {"a": {"seed_of": "x"}, "a.b": {"optim.lr": 3}, "new": {}}
    found = spec(
        text, "overrides.data.pad=target", "grid.optim.lr=[1,2]", "slurm.timeout_min=9", "runs.a={optim.lr: 4}"
    )
    assert (found.overrides, found.grid) == ({"data.pad": "target"}, {"optim.lr": [1, 2]})
    assert found.slurm == {"timeout_min": 9} and found.runs["a"] == {"optim.lr": 4}


@pytest.mark.parametrize("typed", ["runs.abd.optim.lr=1", "first.stgae.optim.lr=1"])
def test_a_typed_key_of_a_row_that_is_not_there_is_refused(spec, typed):
    with pytest.raises(UserError, match="did you mean '(abc|stage)'"):
        spec("first: {stage: {}}\nruns: {abc: {}}", typed)


@pytest.mark.parametrize("argument", ["seed=1", "name=x", "resume=never"])
def test_what_the_sweep_sets_can_t_be_typed(spec, argument):
    with pytest.raises(UserError, match="the sweep sets"):
        spec("runs: {a: {}}", argument)


def test_missing_files_and_keys_are_named(tmp_path):
    with pytest.raises(UserError, match="no experiment file"):
        load_spec(tmp_path / "none.yaml")
    path = tmp_path / "exp.yaml"
    path.write_text("runs: {a: {}}\nconfig: x.yaml\n")
    with pytest.raises(UserError, match="the key 'columns' is missing"):
        load_spec(path)


def test_the_name_of_a_part_comes_before_its_options():
    layers = layers_of({"model.composer.dropout": 0.5, "model.composer": "combiner", "optim.lr": 1.0}, "x")
    assert [layer for _, layer in layers] == [
        {"model": {"composer": "combiner"}}, {"optim": {"lr": 1.0}}, {"model": {"composer": {"dropout": 0.5}}},
    ]  # fmt: skip
    named = layers_of({"model.composer.dropout": 0.5, "model.composer.name": "combiner"}, "x")
    assert named[0][1] == {"model": {"composer": {"name": "combiner"}}}


def test_labels_become_folders():
    assert folder_name("lr=1e-3, ±x/../y") == "lr=1e-3,__x_.._y"
