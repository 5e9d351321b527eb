import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cliplab.training.feature_store import FeatureStore

SETTINGS = {"weights": "abc", "pad": "none"}


def ids(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16) for number in numbers]


def features(*numbers: int) -> Tensor:
    return torch.tensor([[number + 0.1, -number, 1 / 3] for number in numbers])


def filled(folder: Path, *numbers: int) -> FeatureStore:
    store = FeatureStore(folder, "images", SETTINGS)
    store.write(ids(*numbers), features(*numbers))
    return store


def shard(store: FeatureStore) -> Path:
    (path,) = store.folder.glob("*.safetensors")
    return path


def test_another_object_reads_what_one_wrote(tmp_path):
    filled(tmp_path, 5, 3)
    filled(tmp_path, 9)
    store = FeatureStore(tmp_path, "images", SETTINGS)
    rows = store.find(ids(3, 9, 4, 5))
    assert rows[2] == -1 and len(set(rows)) == 4
    given = [rows[1], rows[0], rows[3], rows[1]]
    assert torch.equal(store.gather(torch.tensor(given)), features(9, 3, 5, 9))
    before = store.gather(torch.tensor(rows[:2]))
    filled(tmp_path, 1)
    store.find(ids(1))
    assert torch.equal(store.gather(torch.tensor(rows[:2])), before), "rows that were given out stay valid"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_keep_their_precision(dtype, tmp_path):
    store = FeatureStore(tmp_path, "images", SETTINGS)
    store.write(ids(1), features(1).to(dtype))
    store.find(ids(1))
    found = store.gather(torch.tensor([0, 0]))
    assert found.dtype == dtype and torch.equal(found, features(1, 1).to(dtype))


def test_features_are_mapped_and_not_read_into_memory(tmp_path):
    filled(tmp_path, 1)
    store = FeatureStore(tmp_path, "images", SETTINGS)
    store.find(ids(1))
    assert shard(store).name in Path("/proc/self/maps").read_text()


def test_other_settings_are_another_table(tmp_path):
    filled(tmp_path, 1)
    for kind, settings in (("texts", SETTINGS), ("images", {**SETTINGS, "pad": "square"})):
        store = FeatureStore(tmp_path, kind, settings)
        assert store.find(ids(1)) == [-1] and store.key != FeatureStore(tmp_path, "images", SETTINGS).key


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_ids(path: Path) -> None:
    """Features under the ids of others, behind a valid header."""
    content = path.read_bytes()
    assert content.count(ids(1)[0] + ids(2)[0]) == 1
    path.write_bytes(content.replace(ids(1)[0] + ids(2)[0], ids(2)[0] + ids(1)[0]))


def other_weights(path: Path) -> None:
    save_file({"visual.proj": torch.zeros(3, 3)}, path)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit, swap_ids, other_weights])
def test_a_damaged_file_is_removed_and_said(damage, tmp_path, caplog):
    path = shard(filled(tmp_path, 1, 2))
    damage(path)
    store = FeatureStore(tmp_path, "images", SETTINGS)
    assert store.find(ids(1, 2)) == [-1, -1]
    assert not path.exists() and f"{path} is of no use" in caplog.text
    store.write(ids(1, 2), features(1, 2))
    assert torch.equal(store.gather(torch.tensor(store.find(ids(2, 1)))), features(2, 1))


def test_the_file_of_another_table_is_not_taken(tmp_path):
    other = FeatureStore(tmp_path, "images", {"weights": "other"})
    other.write(ids(1), features(7))
    store = FeatureStore(tmp_path, "images", SETTINGS)
    store.make_folder()
    shard(other).rename(store.folder / "a.safetensors")
    assert store.find(ids(1)) == [-1]


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path, "images", SETTINGS)
    store.make_folder()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.write(ids(1), features(1))
    assert store.find(ids(1)) == [-1]
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.safetensors"))
    killed = store.folder / ".0123-4567.tmp"  # what a killed process leaves
    killed.write_bytes(b"half a file")
    assert store.find(ids(1)) == [-1]


def test_a_dropped_file_is_gone_and_can_be_written_again(tmp_path):
    store = filled(tmp_path, 1, 2)
    rows = store.find(ids(1, 2))
    (number,) = store.unchecked(rows)
    assert store.drop(number).suffix == ".safetensors" and store.find(ids(1, 2)) == [-1, -1]
    store.write(ids(1, 2), features(3, 4))
    assert torch.equal(store.gather(torch.tensor(store.find(ids(1, 2)))), features(3, 4))


WRITER = """
import sys
import threading
from pathlib import Path
import torch
from tests.training.test_feature_store import SETTINGS, features, ids
from cliplab.training.feature_store import FeatureStore
for number in range(60):
    store = FeatureStore(Path(sys.argv[1]), "images", SETTINGS)
    wanted = [number, number + 1, number + 2]
    missing = [n for n, row in zip(wanted, store.find(ids(*wanted))) if row < 0]
    if missing:
        store.write(ids(*missing), features(*missing))
    rows = store.find(ids(*wanted))
    assert (store.gather(torch.tensor(rows)) == features(*wanted)).all()
"""


def test_processes_that_fill_it_at_once_all_read_the_truth(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    root = Path(__file__).parents[2]
    writers = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0 and "of no use" not in said, said
    store = FeatureStore(tmp_path, "images", SETTINGS)
    rows = store.find(ids(*range(62)))
    assert torch.equal(store.gather(torch.tensor(rows)), features(*range(62)))


def test_the_folder_says_what_it_is(tmp_path):
    store = filled(tmp_path, 1)
    assert "delete" in (tmp_path / "README.txt").read_text()
    assert '"pad": "none"' in (store.folder / "key.json").read_text()
    assert "may be deleted" in store.described_size()
    assert load_file(shard(store)).keys() == {"features", "ids"}


def test_who_fills_it_keeps_others_waiting(tmp_path, caplog):
    caplog.set_level("INFO")
    first, order = filled(tmp_path, 1), []
    others = FeatureStore(tmp_path, "images", SETTINGS)

    def wait() -> None:
        with others.filling():
            order.append("other")

    with first.filling():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive() and "another process is filling" in caplog.text
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "other"]


def test_a_disk_without_locks_is_filled_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no locks here")

    caplog.set_level("INFO")
    monkeypatch.setattr("cliplab.files.FileLock.acquire", refuse)
    with filled(tmp_path, 1).filling():
        pass
    assert "can't be locked (no locks here)" in caplog.text


def test_what_is_no_file_is_passed_over(tmp_path):
    store = filled(tmp_path, 1)
    (store.folder / "x.safetensors").mkdir()
    (store.folder / "y.safetensors").symlink_to("/nonexistent")
    again = FeatureStore(tmp_path, "images", SETTINGS)
    assert again.find(ids(1)) == [0] and "may be deleted" in again.described_size()


def test_a_folder_that_is_gone_holds_nothing(tmp_path):
    assert FeatureStore(tmp_path / "gone", "images", SETTINGS).find(ids(1)) == [-1]
