import copy
import re
import statistics
from dataclasses import replace

import pytest

from cliplab.published import PublishedRow
from cliplab.report import console
from cliplab.sweeps import table as tables
from cliplab.sweeps.held import Held, beside
from cliplab.sweeps.plan import Plan, make_plan
from cliplab.sweeps.runner import Runner
from cliplab.sweeps.significance import hits_of, interval, p_value
from cliplab.sweeps.spec import load_spec
from cliplab.sweeps.table import make_table


@pytest.fixture
def swept(finished):
    path, output = finished
    plan = make_plan(load_spec(path, [f"output_dir={output}"]))
    return plan, Runner(plan, console(stderr=True))


def row(table, label):
    return next(row for row in table.rows if row.label == label)


def values(swept, label, metric):
    plan, runner = swept
    return [runner.held[id(run)].results["metrics"][metric] for run in plan.rows[label]]


def test_cells_are_means_and_sample_deviations_over_seeds(swept):
    table = make_table(*swept)
    for label in ("combiner", "tirg"):
        for title, metric in swept[0].spec.columns.items():
            found = values(swept, label, metric)
            cell = row(table, label).cells[title]
            assert cell.mean == pytest.approx(statistics.mean(found)) and cell.std == pytest.approx(
                statistics.stdev(found)
            )
            assert cell.low is not None and cell.low <= cell.mean <= cell.high
        assert row(table, label).seeds == 2 and row(table, label).fit_seconds > 0
    alone = row(table, "image")
    assert alone.cells["R@10"].std is None and alone.seeds == 1 and alone.fit_seconds is None


def test_p_and_intervals_are_those_of_the_ranks(swept):
    plan, runner = swept
    table = make_table(plan, runner)
    ranks = {label: [runner.held[id(run)].ranks for run in runs] for label, runs in plan.rows.items()}
    hits = {n: hits_of("test/mean/R@10", ranks[n], values(swept, n, "test/mean/R@10")) for n in ("tirg", "image")}
    cell = row(table, "tirg").cells["R@10"]
    assert (cell.low, cell.high) == interval(hits["tirg"]) and cell.p == p_value(hits["tirg"], hits["image"])
    assert row(table, "image").cells["R@10"].p is None, "the baseline differs from nothing"


def test_the_highest_mean_is_best(swept):
    table = make_table(*swept)
    for title in table.columns:
        means = {r.label: r.cells[title].mean for r in table.rows}
        assert {r.label for r in table.rows if r.cells[title].is_best} == {
            label for label, mean in means.items() if mean == max(means.values())
        }


def test_title_and_notes_say_what_was_measured(swept):
    table = make_table(*swept)
    assert table.title == "rows: data wardrobe, split val, protocol clip4cir, seeds 0, 1 (recalls in %)"
    assert table.varying == [] and any(note.startswith("† differs from image: p < 0.05") for note in table.notes)
    assert not any("different commits" in note or "not compared" in note for note in table.notes)


def with_results(swept, label, change):
    """The state of a sweep whose results of one row were others."""
    plan, runner = swept
    for run in plan.rows[label]:
        held = runner.held[id(run)]
        results = copy.deepcopy(held.results)
        change(results)
        runner.held[id(run)] = Held("", results, held.ranks)
    return plan, runner


def test_other_protocols_get_a_column_and_no_common_best(swept):
    def change(results):
        results["protocol"]["name"] = "val"

    table = make_table(*with_results(swept, "image", change))
    assert table.varying == ["protocol"] and "protocol" not in table.title.split(",")[0]
    assert row(table, "image").setting["protocol"] == "val" and row(table, "tirg").setting["protocol"] == "clip4cir"
    assert not any(cell.is_best for cell in row(table, "image").cells.values())


def test_of_median_ranks_the_least_is_best(swept):
    plan, runner = swept
    columns = {"MedR": "test/dress/median_rank", "R@10": "test/dress/R@10"}
    table = make_table(replace(plan, spec=replace(plan.spec, columns=columns)), runner)
    least = min(r.cells["MedR"].mean for r in table.rows)
    assert {r.label for r in table.rows if r.cells["MedR"].is_best} == {
        r.label for r in table.rows if r.cells["MedR"].mean == least
    }


def test_other_queries_are_not_paired(swept):
    plan, runner = swept
    for run in plan.rows["image"]:
        held = runner.held[id(run)]
        ranks = {name: ([f"x{q}" for q in names], found) for name, (names, found) in held.ranks.items()}
        runner.held[id(run)] = Held("", held.results, ranks)
    table = make_table(plan, runner)
    cell = row(table, "tirg").cells["R@10"]
    assert cell.p is None and cell.low is not None
    assert "not compared with image, as their queries are others: combiner, tirg" in table.notes


def test_commits_and_stand_ins_are_told(swept):
    def change(results):
        results["commit"] = "abc"
        results["data"]["stand_in_images"] = True

    notes = " ".join(make_table(*with_results(swept, "image", change)).notes)
    assert "different commits of the code: " in notes and "abc" in notes and "STAND-INS" in notes


def test_failed_and_missing_runs_stay_in_the_table_with_their_log(swept):
    plan, runner = swept
    lost, cut = plan.rows["image"][0], plan.rows["tirg"][1]
    runner.held[id(lost)], runner.held[id(cut)] = Held("not run yet"), Held("interrupted")
    runner.failures[id(lost)] = "a.log: error: no memory"
    table = make_table(plan, runner)
    assert row(table, "image").cells == {} and row(table, "image").note == "seed 0 FAILED: a.log: error: no memory"
    assert row(table, "tirg").seeds == 1 and row(table, "tirg").cells["R@10"].std is None
    assert row(table, "tirg").note == "seed 1 interrupted"
    log = beside(cut.directory, "log")
    log.write_text("CUDA out of memory\n")
    try:
        assert row(make_table(plan, runner), "tirg").note == f"seed 1 interrupted: {log}: CUDA out of memory"
    finally:
        log.unlink()


def published(split="val", **protocol):
    fields = dict.fromkeys(tables.differing_fields.__globals__["FIELDS"]) | protocol
    metrics = {f"{name}/R@{k}": 10.0 + k for name in ("dress", "shirt", "toptee") for k in (10, 50)}
    return PublishedRow("wardrobe", split, "M", "B", metrics, fields, "a paper", "document", 2020)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"gallery": "original_split"}, "published", "published, 2020, document"),
        ({"gallery": "val_split", "exclude_reference": True}, "foreign", "gallery=val_split, exclude_reference=True"),
        ({"gallery": "original_split", "split": "test"}, "foreign", "another protocol: split=test"),
        ({}, "foreign", "protocol unknown"),
    ],
)
def test_published_rows_stand_below_theirs_and_name_what_differs(swept, given, kind, said):
    plan, runner = swept
    plan = Plan(plan.spec, plan.first, plan.rows, {"tirg": [published(**given)]})
    table = make_table(plan, runner)
    assert [r.label for r in table.rows] == ["combiner", "tirg", "M [B]", "image"]
    found = row(table, "M [B]")
    assert found.kind == kind and said in found.note
    assert found.cells["dress R@10"].mean == 20 and found.cells["R@10"].mean == pytest.approx(20)


def test_published_rows_stand_below_a_row_that_waits(swept):
    plan, runner = swept
    for run in plan.rows["tirg"]:
        runner.held[id(run)] = Held("not run yet")
    plan = Plan(plan.spec, plan.first, plan.rows, {"tirg": [published(gallery="original_split")]})
    table = make_table(plan, runner)
    assert not row(table, "tirg").cells and row(table, "tirg").setting == row(table, "image").setting
    assert row(table, "M [B]").kind == "published" and row(table, "M [B]").cells["dress R@10"].mean == 20


def test_nothing_published_stands_beside_stand_ins(swept):
    plan, runner = with_results(swept, "tirg", lambda results: results["data"].update(stand_in_images=True))
    plan = Plan(plan.spec, plan.first, plan.rows, {"tirg": [published(gallery="original_split")]})
    assert "M [B]" not in [r.label for r in make_table(plan, runner).rows]


def test_first_runs_are_counted_once(swept):
    plan, runner = swept
    stage = plan.rows["tirg"][0]
    plan = Plan(plan.spec, {"stage": stage}, plan.rows, {})
    notes = make_table(plan, runner).notes
    own = runner.held[id(stage)].results["seconds"]["fit"]
    assert f"stage, once before the rows: {own:.0f} s" in notes
    trained = [run for label in ("combiner", "tirg") for run in plan.rows[label]]
    total = own + sum(runner.held[id(run)].results["seconds"]["fit"] for run in trained)
    assert float(re.search(r"together: (\d+) s", " ".join(notes))[1]) == pytest.approx(total, abs=0.6)
