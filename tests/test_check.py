import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cliplab import check
from cliplab.check import Findings, check_data, counts_table, flat
from cliplab.config import merge_config
from cliplab.errors import UserError
from cliplab.published import Edition, published_counts
from tests.data.cir_files import make_cirr, write_picture


def config(root: Path, **data):
    layers = {"name": "checked", "output_dir": str(root / "runs"), "model": {"composer": {"name": "sum"}}}
    return merge_config([("test", {**layers, "data": {"name": "cirr", "root": str(root), **data}})])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_cirr(tmp_path)


def test_sound_pictures_and_other_counts(root: Path) -> None:
    found = check_data(config(root))
    assert found.pictures == 8 + 5  # all of val, and the references and targets of train's four records
    assert found.counts["val.records"] == 4 and found.counts["train.images"] == 8
    assert "val.records" in found.differing() and found.edition is not None and not found.is_sound()
    assert (found.missing, found.unreadable, found.duplicates) == ([], {}, [])
    assert len(found.manifest_hash) == 64


def test_missing_unreadable_and_duplicate_pictures_are_listed(root: Path) -> None:
    (root / "dev/dev-7-0-img1.png").unlink()
    (root / "dev/dev-6-0-img0.png").write_bytes(b"no picture")
    shutil.copy(root / "dev/dev-5-0-img1.png", root / "dev/dev-4-0-img0.png")
    found = check_data(config(root))
    assert found.missing == ["dev-7-0-img1"]
    assert [Path(path).name for path in found.unreadable] == ["dev-6-0-img0.png"]
    assert [[Path(path).stem for path in group] for group in found.duplicates] == [["dev-4-0-img0", "dev-5-0-img1"]]


def test_what_is_published_decides_what_differs() -> None:
    edition = Edition("made", "checked", {"val": {"images": 3}, "test": {"images": 2}})
    found = Findings({"val.images": 3, "test.images": 2, "val.captions": 9}, edition)
    assert found.differing() == [] and found.is_sound()
    assert Findings({"val.images": 4, "test.images": 2}, edition).differing() == ["val.images"]
    assert Findings({"val.images": 3}, edition).differing() == ["test.images"]
    assert Findings({}, None).is_sound() and not Findings({}, None, missing=["a"]).is_sound()
    assert counts_table(found, "").row_count == 3


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_editions() -> None:
    assert {edition.edition for edition in published_counts("coco")} == {"Karpathy's splits", "captions_val2017.json"}
    fashion = flat(published_counts("fashioniq")[0].counts)
    assert sum(value for key, value in fashion.items() if key.endswith("train.records")) == 18_000
    assert published_counts("wardrobe") == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cliplab.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_exit_codes(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        for number, name in enumerate(("hat", "shoe")):
            write_picture(tmp_path / "data" / split / name / "0.png", seed=number + len(split))
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{name: image_folder, root: {tmp_path / 'data'}}}\noutput_dir: {tmp_path / 'runs'}\n")
    sound = run("--config", str(file))
    assert sound.returncode == 0, sound.stderr
    assert json.loads((tmp_path / "runs/check-c.json").read_text())["pictures"] == 6
    (tmp_path / "data/test/hat/0.png").write_bytes(b"")
    damaged = run("--config", str(file))
    assert damaged.returncode == 1 and "unreadable: 1" in damaged.stdout
    unusable = run("--config", str(file), "data.root=nowhere")
    assert unusable.returncode == 2 and unusable.stderr.startswith("error: ") and "Traceback" not in unusable.stderr


def test_a_failure_of_the_check_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{name: image_folder, root: {tmp_path}}}\n")

    def crash(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(check, "check_data", crash)
    monkeypatch.setattr(check.log.parent, "propagate", True)
    with pytest.raises(SystemExit) as left:
        check.main(["--config", str(tmp_path / "c.yaml")])
    assert left.value.code == 2
    assert "the check itself failed" in caplog.text and "KeyError: 'unforeseen'" in caplog.text


def test_where_nothing_can_be_written_nothing_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{name: cirr, root: {root}}}\nmodel: {{composer: sum}}\n")
    given = ["--config", str(tmp_path / "c.yaml")]
    (tmp_path / "blocked").write_text("a file where the folder of the findings belongs")
    monkeypatch.setattr(check, "check_data", lambda config: pytest.fail("it was read"))
    with pytest.raises(UserError, match=f"^output_dir={tmp_path / 'blocked'} .*{tmp_path / 'blocked'} is a file"):
        check.main([*given, f"output_dir={tmp_path / 'blocked'}"])
    monkeypatch.setattr(check, "check_data", lambda config: Findings({}, None))
    (tmp_path / "out" / "check-c.json").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^output_dir={tmp_path / 'out'}: can't write .*check-c.json"):
        check.main([*given, f"output_dir={tmp_path / 'out'}"])


def test_an_unknown_option_is_the_users_error(root: Path) -> None:
    with pytest.raises(UserError, match="protocol"):
        check_data(config(root, protocol={"name": "nobody"}))
