"""What is run again, in which order, and what becomes of failures and interruptions."""

import json
import os
import shutil

import pytest

from cliplab import results
from cliplab.errors import UserError
from cliplab.report import console
from cliplab.run import checkpoint_of
from cliplab.sweeps.held import beside
from cliplab.sweeps.local import Local
from cliplab.sweeps.plan import make_plan
from cliplab.sweeps.runner import Runner, executor_of, failure_of
from cliplab.sweeps.spec import load_spec
from tests.conftest import TINY
from tests.data.cir_files import make_cirr
from tests.sweeps.conftest import ALL, InProcess, sweep_here

STAGES = """
config: {config}
first: {{stage: {{model.composer: sum}}}}
overrides: {{model.arch: "{{stage}}", model.freeze: [image_encoder, text_encoder]}}
runs: {{combiner: {{}}, sum: {{model.composer: sum}}}}
evaluate: [sum]
columns: {{R@10: test/mean/R@10}}
"""


def test_a_second_call_runs_nothing(copied):
    assert copied().started == []


def missing(finished, tmp_path, *changes):
    """What the finished sweep would run again if its file were another one."""
    text = finished[0].read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    runner = runner_of(finished, text=text, tmp_path=tmp_path)
    return {run.title: runner.held[id(run)].missing for run in runner.missing()}


def test_a_changed_option_of_the_base_reruns_what_trains_and_no_evaluation(finished, tmp_path):
    found = missing(finished, tmp_path, ("max_epochs: 1", "max_epochs: 1, optim.lr: 2.0e-3"))
    assert found == dict.fromkeys(ALL[:4], "differs in optim.lr")
    assert list(missing(finished, tmp_path, ("max_epochs: 1", "max_epochs: 2"))) == ALL[:4]
    assert list(missing(finished, tmp_path, ("max_epochs: 1", "max_epochs: 1, data.pad: square"))) == ALL
    assert missing(finished, tmp_path, ("max_epochs: 1", "max_epochs: 1, data.num_workers: 1")) == {}


def test_a_part_s_option_reruns_the_row_that_has_the_part(finished, tmp_path):
    found = missing(finished, tmp_path, ("max_epochs: 1", "max_epochs: 1, model.composer.dropout: 0.2"))
    assert found == dict.fromkeys(ALL[:2], "differs in model.composer.dropout")


def test_a_changed_row_and_a_new_seed_run_alone(finished, tmp_path):
    found = missing(finished, tmp_path, ("tirg: {", "tirg: {optim.warmup: 0.2, "), ("[0, 1]", "[1, 2]"))
    assert found == {
        "combiner, seed 2": "not run yet",
        "tirg, seed 1": "differs in optim.warmup",
        "tirg, seed 2": "not run yet",
        "image, seed 1": "not run yet",
    }


def test_other_packages_and_other_data_rerun_everything(finished, tmp_path, monkeypatch):
    real = results.versions()
    monkeypatch.setattr(results, "versions", lambda: real | {"torch": "0.1", "python": "2.7"})
    assert missing(finished, tmp_path) == dict.fromkeys(ALL, "differs in versions.torch")


def test_damaged_runs_are_made_again_with_the_same_numbers(copied, finished, tmp_path):
    rows = tmp_path / "out" / "rows"
    before = copied().metrics
    (rows / "combiner" / "seed-0" / "results.json").write_text("{")
    (rows / "tirg" / "seed-1" / "ranks" / "dress.csv").unlink()
    shutil.rmtree(rows / "image" / "seed-0")
    swept = copied()
    assert swept.started == ["combiner, seed 0", "tirg, seed 1", "image, seed 0"]
    assert swept.metrics == before


@pytest.fixture
def staged(tiny_config, tmp_path):
    path = tmp_path / "staged.yaml"
    path.write_text(STAGES.format(config=tiny_config))

    def again(*arguments):
        return sweep_here(
            path, f"output_dir={tmp_path / 'out'}", "data.num_workers=0", "trainer.max_steps=3", *arguments
        )

    return again


def test_rows_start_after_the_runs_that_they_need_and_follow_them(staged, tmp_path):
    first = staged()
    assert first.started == ["stage, seed 0", "combiner, seed 0", "sum, seed 0"]
    stage, row = first.metrics["stage, seed 0"], first.metrics["sum, seed 0"]
    assert {key: row[key] for key in stage} == stage, "the evaluated row measures the towers of the stage"
    assert (tmp_path / "out" / "feature_cache").is_dir()
    shutil.rmtree(tmp_path / "out" / "staged" / "stage" / "seed-0")
    again = staged()
    assert again.started == ["stage, seed 0"] and again.metrics == first.metrics, "the same towers: the rows hold"
    assert staged("optim.lr=5e-3").started == first.started


def test_one_checkpoint_is_measured_under_several_protocols(tiny_config, tmp_path):
    path = tmp_path / "measured.yaml"
    path.write_text(
        f"config: {tiny_config}\nfirst: {{model: {{trainer.max_steps: 3}}}}\nevaluate: true\ncheckpoint: '{{model}}'\n"
        "runs: {own: {}, val: {data.protocol: val}}\ncolumns: {R@10: test/mean/R@10}\nbaseline: own\n"
    )
    swept = sweep_here(path, f"output_dir={tmp_path / 'out'}")
    assert swept.started == ["model, seed 0", "own, seed 0", "val, seed 0"] and not swept.runner.failures
    assert swept.metrics["own, seed 0"] == swept.metrics["model, seed 0"] != swept.metrics["val, seed 0"]
    assert swept.table.varying == ["protocol"]
    assert sweep_here(path, f"output_dir={tmp_path / 'out'}").started == []
    changed = sweep_here(path, f"output_dir={tmp_path / 'out'}", "optim.lr=5e-3")
    assert changed.started == swept.started, "the checkpoint is another one, though no row has a learning rate"


def test_another_file_behind_a_name_is_another_model(tiny_config, tmp_path):
    arch = tmp_path / "tower.json"
    arch.write_text(json.dumps(TINY))
    path = tmp_path / "named.yaml"
    path.write_text(
        f"config: {tiny_config}\noverrides: {{model.arch: {arch}, trainer.max_steps: 2}}\nruns: {{image: {{}}}}\n"
        "columns: {R@10: test/mean/R@10}\n"
    )
    given = path, f"output_dir={tmp_path / 'out'}"
    assert sweep_here(*given).started == ["image, seed 0"] and sweep_here(*given).started == []
    arch.write_text(json.dumps({**TINY, "embed_dim": 8}))
    assert sweep_here(*given).started == ["image, seed 0"]
    run = tmp_path / "out" / "named" / "image" / "seed-0"
    measured = tmp_path / "measured.yaml"
    measured.write_text(path.read_text().replace(str(arch), str(run)).replace("columns", "evaluate: true\ncolumns"))
    again = measured, f"output_dir={tmp_path / 'out'}"
    assert sweep_here(*again).started == ["image, seed 0"] and sweep_here(*again).started == []
    os.utime(checkpoint_of(run), (1, 1))
    assert sweep_here(*again).started == ["image, seed 0"]


def test_targets_of_a_test_server_are_told_before_anything_runs(tiny_config, tmp_path):
    path = tmp_path / "blind.yaml"
    path.write_text(
        f"config: {tiny_config}\noverrides: {{data.name: cirr, data.root: {make_cirr(tmp_path / 'data')}, "
        "data.split: test, model.composer: sum}\nruns: {sum: {}}\nevaluate: true\ncolumns: {R@1: test/cirr/R@1}\n"
    )
    with pytest.raises(UserError, match="blind.yaml: sum: the targets of data.name=cirr data.split=test are known to"):
        sweep_here(path, f"output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_log_that_is_a_folder_fails_its_row_alone(tiny_config, tmp_path):
    path = tmp_path / "logs.yaml"
    path.write_text(
        f"config: {tiny_config}\noverrides: {{trainer.max_steps: 2}}\nruns: {{one: {{}}}}\nevaluate: true\n"
        "columns: {R@10: test/mean/R@10}\n"
    )
    plan = make_plan(load_spec(path, [f"output_dir={tmp_path / 'out'}"]))
    beside(plan.runs[0].directory, "log").mkdir(parents=True)
    runner = Runner(plan, console(stderr=True))
    runner.run(Local(1))
    assert "can't be started: [Errno 21]" in runner.failures[id(plan.runs[0])]


def test_a_run_before_teaches_one_row_and_is_measured_by_another(tiny_config, tmp_path):
    path = tmp_path / "taught.yaml"
    path.write_text(
        f"config: {tiny_config}\noverrides: {{trainer.max_steps: 3}}\nfirst: {{teacher: {{trainer.max_steps: 3}}}}\n"
        "runs: {taught: {loss: distillation, teacher.arch: '{teacher}'}, itself: {}, untrained: {}}\n"
        "evaluate: [itself, untrained]\ncheckpoint: {itself: '{teacher}'}\ncolumns: {R@10: test/mean/R@10}\n"
    )
    swept = sweep_here(path, f"output_dir={tmp_path / 'out'}")
    assert swept.started == [f"{label}, seed 0" for label in ("teacher", "taught", "itself", "untrained")]
    assert not swept.runner.failures
    assert swept.metrics["itself, seed 0"] == swept.metrics["teacher, seed 0"] != swept.metrics["untrained, seed 0"]
    assert sweep_here(path, f"output_dir={tmp_path / 'out'}").started == []
    with pytest.raises(UserError, match="^taught: teacher.arch=nowhere: composed queries are taught by a run"):
        sweep_here(path, f"output_dir={tmp_path / 'out'}", "runs.taught.teacher.arch=nowhere")


def test_what_needs_a_failed_run_fails_with_its_log_and_the_others_go_on(staged, tmp_path):
    stage = tmp_path / "out" / "staged" / "stage" / "seed-0"
    stage.mkdir(parents=True)
    (stage / "mine.txt").write_text("not a run")
    swept = staged()
    assert swept.started == ["stage, seed 0"]
    failures = {run.label: swept.runner.failures[id(run)] for run in swept.plan.runs}
    assert str(beside(stage, "log")) in failures["stage"] and "holds files but no run" in failures["stage"]
    assert failures["combiner"] == failures["sum"] == f"needs stage: {failures['stage']}"
    (stage / "mine.txt").unlink()
    assert len(staged().started) == 3


def runner_of(finished, *arguments, text=None, tmp_path=None):
    path = finished[0]
    if text is not None:
        path = tmp_path / path.name
        path.write_text(text)
    plan = make_plan(load_spec(path, [f"output_dir={finished[1]}", *arguments]))
    return Runner(plan, console(stderr=True))


def test_an_unknown_metric_of_a_finished_row_is_told_with_the_closest(finished, tmp_path):
    text = finished[0].read_text().replace("test/dress/R@10", "test/dres/R@10")
    with pytest.raises(UserError, match=r"columns.dress R@10: the row 'combiner' .* did you mean 'test/dress/R@10'"):
        runner_of(finished, text=text, tmp_path=tmp_path).check_columns_of_done()


def test_an_unknown_metric_is_told_before_a_row_runs_by_its_own_protocol(finished, tmp_path):
    text = finished[0].read_text().replace("image: {", "image: {data.protocol: {name: clip4cir, recall_at: [1, 5]}, ")
    with pytest.raises(UserError, match=r"row 'image' \(protocol clip4cir \(recall_at=.* no metric 'test/mean/R@10'"):
        runner_of(finished, f"output_dir={tmp_path}", text=text, tmp_path=tmp_path).check()


def test_what_train_py_would_refuse_is_refused_before_any_run(finished, tmp_path):
    text = finished[0].read_text().replace("composer: tirg}", "composer: tigr}")
    with pytest.raises(UserError, match="tirg: unknown composer 'tigr': did you mean 'tirg'"):
        runner_of(finished, text=text, tmp_path=tmp_path).check()
    with pytest.raises(UserError, match="nowhere"):
        runner_of(finished, "data.name=fashioniq", "data.root=nowhere").check()


class Interrupted(InProcess):
    def start(self, runs):
        raise KeyboardInterrupt

    def stop(self):
        self.started.append("stopped")
        return "stopped"


def test_an_interruption_stops_the_executor_and_is_passed_on(finished, tmp_path, capsys):
    runner, executor = runner_of(finished, f"output_dir={tmp_path}"), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        runner.run(executor)
    assert executor.started == ["stopped"] and "Give the same command again" in capsys.readouterr().err


def test_a_request_is_all_that_a_worker_needs(finished):
    request = json.loads((finished[1] / "rows/image/seed-0.request.json").read_text())
    assert request["evaluated"] and request["config"]["model"]["composer"] == {"name": "image_only"}
    assert request["identity"]["data"] and request["checkpoint"] is None


def test_the_log_of_a_failure_is_named_with_its_last_line(finished):
    run = runner_of(finished).plan.runs[0]
    log = beside(run.directory, "log")
    assert failure_of(run) == "no log"
    log.write_text("one\nerror: two\n\n")
    assert failure_of(run) == f"{log}: error: two"
    log.unlink()


def test_the_executor_is_the_one_that_is_asked_for(finished):
    plan = runner_of(finished, "jobs=3").plan
    executor = executor_of(plan.spec, plan)
    assert isinstance(executor, Local) and executor.free == 3
