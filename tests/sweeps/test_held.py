"""Each way in which a run directory can be damaged counts as not run, with its reason."""

import json
import shutil

import pytest

from cliplab.report import console
from cliplab.results import write_json
from cliplab.sweeps.held import beside, holds, read_json
from cliplab.sweeps.plan import make_plan
from cliplab.sweeps.runner import Runner
from cliplab.sweeps.spec import load_spec


@pytest.fixture
def run(finished, tmp_path):
    """(directory, what it is asked for) of a copy of a finished run."""
    path, output = finished
    shutil.copytree(output / "rows" / "combiner", tmp_path / "combiner")
    plan = make_plan(load_spec(path, [f"output_dir={output}"]))
    runner = Runner(plan, console(stderr=True))
    return tmp_path / "combiner" / "seed-0", runner.identity(plan.rows["combiner"][0])


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_finished_run_is_held_with_its_results_and_ranks(run):
    held = holds(*run, evaluated=False, keeps_checkpoint=True)
    assert held.missing == "" and set(held.ranks) == {"dress", "shirt", "toptee"}
    names, columns = held.ranks["dress"]
    ranks = columns["rank"]
    assert len(names) == len(ranks) == 20
    assert held.results["metrics"]["test/dress/R@10"] == pytest.approx(100 * sum(rank <= 10 for rank in ranks) / 20)


def test_another_identity_is_named(run):
    directory, identity = run
    assert holds(directory, {**identity, "optim.lr": 7}, False, False).missing == "differs in optim.lr"
    assert holds(directory, {**identity, "first.stage": "x"}, False, False).missing == "differs in first.stage"


def test_what_has_not_started_or_not_ended(run):
    directory, identity = run
    (directory / "results.json").unlink()
    assert holds(directory, identity, False, False).missing == "interrupted"
    (directory / "checkpoints" / "last.ckpt").unlink()
    assert holds(directory, identity, False, False).missing == "not finished"
    beside(directory, "started.json").unlink()
    assert "is not this sweep's" in holds(directory, identity, False, False).missing
    shutil.rmtree(directory)
    assert holds(directory, identity, False, False).missing == "not run yet"


def metric(content):
    content["metrics"]["test/dress/R@10"] += 5


def told(key, value):
    return lambda content: content["metrics"].update({key: value})


DAMAGES = {
    "cut results": (lambda d: (d / "results.json").write_text((d / "results.json").read_text()[:500]), "can't read"),
    "empty results": (lambda d: (d / "results.json").write_text("{}"), "no results.json of schema"),
    "a metric": (lambda d: edit(d / "results.json", metric), "gives R@10"),
    "no metric": (lambda d: edit(d / "results.json", lambda c: c["metrics"].clear()), "results.json None"),
    "a section": (lambda d: edit(d / "results.json", lambda c: c.pop("protocol")), "has no protocol"),
    "a section's type": (lambda d: edit(d / "results.json", lambda c: c.update(data=[])), "has no data"),
    "a config": (lambda d: edit(d / "results.json", lambda c: c["config"]["optim"].update(lr=3)), "optim.lr"),
    "a config's key": (
        lambda d: edit(d / "results.json", lambda c: c["config"].update(x=3)),
        "results.json differs in x",
    ),
    "versions": (lambda d: edit(d / "results.json", lambda c: c["versions"].update(torch="1")), "versions.torch"),
    "no benchmarks": (lambda d: edit(d / "results.json", lambda c: c["data"].pop("benchmarks")), "benchmarks"),
    "a mean": (lambda d: edit(d / "results.json", told("test/mean/R@10", 7)), "gives mean R@10"),
    "no number": (lambda d: edit(d / "results.json", told("test/dress/R@10", float("nan"))), "R@10 is nan"),
    "null": (lambda d: edit(d / "results.json", told("test/mean/R@10", None)), "test/mean/R@10 is None"),
    "words": (lambda d: edit(d / "results.json", told("test/mean/R@50", "x")), "test/mean/R@50 is 'x'"),
    "seconds": (lambda d: edit(d / "results.json", lambda c: c["seconds"].update(fit=[1])), "seconds.fit is [1]"),
    "protocol": (lambda d: edit(d / "results.json", lambda c: c["protocol"].update(name="x")), "data.protocol.name"),
    "split": (lambda d: edit(d / "results.json", lambda c: c["protocol"].pop("split")), "does not tell protocol.split"),
    "stand-ins": (lambda d: edit(d / "results.json", lambda c: c["data"].pop("stand_in_images")), "stand_in_images"),
    "a benchmark": (lambda d: edit(d / "results.json", lambda c: c["data"]["benchmarks"].pop("dress")), "ranks holds"),
    "none": (lambda d: edit(d / "results.json", lambda c: c["data"].update(benchmarks={})), "results.json none"),
    "no ranks": (lambda d: (d / "ranks" / "shirt.csv").unlink(), "ranks holds dress, toptee"),
    "cut ranks": (lambda d: (d / "ranks/dress.csv").write_text("query,rank,ties\na,1,0\n"), "dress.csv has 1 queries"),
    "words for ranks": (lambda d: (d / "ranks/dress.csv").write_text("query,rank,ties\na,x,0\n"), "dress.csv"),
    "other ranks": (lambda d: (d / "ranks/dress.csv").write_text("a,b\n1,2\n"), "dress.csv"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_by_hand_is_named(run, name):
    damage, said = DAMAGES[name]
    damage(run[0])
    held = holds(*run, evaluated=False, keeps_checkpoint=False)
    assert held.is_damaged and held.missing.startswith("damaged: ") and said in held.missing


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-50])])
def test_a_checkpoint_counts_where_other_runs_need_it(run, damage):
    directory, identity = run
    damage(directory / "checkpoints" / "best.ckpt")
    (directory / "checkpoints" / "last.ckpt").unlink()
    assert holds(directory, identity, False, False).missing == ""
    assert "no checkpoint" in holds(directory, identity, False, True).missing


def test_files_of_the_sweep_are_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1]})
    assert read_json(path) == {"a": [1]} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "none.json") is None
    for text in ("{", "[1]", "\x00"):
        path.write_text(text)
        assert read_json(path) is None
