import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliplab import cli
from cliplab.errors import UserError

SCRIPT = """
import sys
from cliplab.cli import run_script
from cliplab.errors import UserError

def main(arguments):
    raise {raised}

run_script(main)
"""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`run_script` sets up the process: put the logger and the environment back."""
    logger = logging.getLogger("cliplab")
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


def test_a_user_error_is_exit_code_2_and_its_message_alone() -> None:
    done = run(SCRIPT.format(raised="UserError('no file a.json')"), "seed=1")
    assert (done.returncode, done.stderr, done.stdout) == (2, "error: no file a.json\n", "")


def test_debug_shows_the_traceback_of_a_user_error() -> None:
    done = run(SCRIPT.format(raised="UserError('no file a.json')"), "seed=1", "debug=true")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "no file a.json" in done.stderr


def raising(error: BaseException):
    def main(arguments: object) -> None:
        raise error

    return main


def test_the_message_from_a_worker_comes_without_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    text = "Caught UserError in DataLoader worker process 0.\nTraceback ...\ncliplab.errors.UserError: a.jpg is damaged"
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(raising(UserError(text)))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a.jpg is damaged\n"


@pytest.mark.parametrize("flag", ["debug=true", "debug=True"])
def test_debug_raises_the_user_error(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", flag])
    with pytest.raises(UserError, match="mend this"):
        cli.run_script(raising(UserError("mend this")))


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), AssertionError("bug"), KeyboardInterrupt("bug")])
def test_other_exceptions_are_not_swallowed(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(type(error), match="bug"):
        cli.run_script(raising(error))


def test_main_gets_the_arguments_and_our_log_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a.yaml", "seed=1"])
    seen: list[str] = []

    def main(arguments: list[str]) -> None:
        seen.extend(arguments)
        logging.getLogger("cliplab.run").info("continuing %s", "runs/a")

    cli.run_script(main)
    assert seen == ["--config", "a.yaml", "seed=1"]
    assert capsys.readouterr().err == "continuing runs/a\n"


@pytest.mark.parametrize(
    "arguments",
    [["--config", "a.yaml", "x=1", "y=2"], ["x=1", "--config", "a.yaml", "y=2"], ["x=1", "y=2", "--config=a.yaml"]],
)
def test_overrides_stand_before_and_behind_the_flags(arguments: list[str]) -> None:
    given = cli.parse("Train.", ["config", "checkpoint"], arguments)
    assert (given.config, given.checkpoint, given.overrides) == ("a.yaml", None, ["x=1", "y=2"])


def test_without_arguments_nothing_is_given() -> None:
    given = cli.parse("Train.", ["config"], [])
    assert (given.config, given.overrides) == (None, [])


@pytest.mark.parametrize("arguments", [["--conf", "a.yaml"], ["--checkpoint", "a.ckpt"], ["--lr=1"], ["--config"]])
def test_an_unknown_flag_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse("Train.", ["config"], arguments)
    assert stopped.value.code == 2
    assert arguments[0].split("=")[0] in capsys.readouterr().err


def help_text(capsys: pytest.CaptureFixture[str], folder: str = "configs") -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.parse("Train a thing.", ["config"], ["--help"], folder)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_configs_with_their_headlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "none in ./configs" in help_text(capsys)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "b.yaml").write_text("# 90 % of the pictures.\n# python train.py\nseed: 1\n")
    (tmp_path / "configs" / "a.yaml").write_text("#   Learn from scratch.\n")
    text = help_text(capsys)
    assert "configs:\n  configs/a.yaml  Learn from scratch.\n  configs/b.yaml  90 % of the pictures.\n" in text
    assert "Train a thing." in text and "--config FILE" in text and "key=value" in text


FAULTS = """
import ctypes, resource
from cliplab.cli import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    libc.free(libc.memset(block, 1, 2**26))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(("told", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(told, kept):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment | told, capture_output=True, text=True)
    assert (int(done.stdout) < 1000) == kept, done.stderr


def test_help_of_a_sweep_lists_the_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "experiments:\n  none in ./experiments" in help_text(capsys, "experiments")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "a.yaml").write_text("# Composers.\n")
    text = help_text(capsys, "experiments")
    assert "  experiments/a.yaml  Composers.\n" in text and "src/cliplab/sweeps/spec.py" in text
