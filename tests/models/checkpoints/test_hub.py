"""What lies on this machine is found without the network; else one try."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from cliplab.errors import UserError
from cliplab.models.checkpoints.hub import WEIGHT_FILES, hub_file, hub_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one repository in it, in the hub's own layout, and no network."""
    folder = tmp_path / "cache" / "models--org--known"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text(name)

    def refuse(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_local_folder_is_itself(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "org" / "known").mkdir(parents=True)
    assert hub_folder("org/known", ["*"], ["*.safetensors"]) == Path("org/known")


def test_what_was_fetched_before_is_found(cache: Path) -> None:
    assert hub_folder("org/known", ["*.json"], ["*.safetensors"]) == cache
    assert hub_file("org/known", "config.json").read_text() == "config.json"


def test_a_file_that_was_not_fetched_needs_the_network(cache: Path) -> None:
    with pytest.raises(UserError, match="'org/known' can't be reached"):
        hub_folder("org/known", ["*.json"], ["*.bin"])
    with pytest.raises(UserError, match="'org/known' can't be reached"):
        hub_file("org/known", "other.bin")


@pytest.mark.parametrize("name", ["org/unknown", "unknown", "not a name/at/all"])
def test_without_a_network_the_way_out_is_told(name: str, cache: Path) -> None:
    with pytest.raises(
        UserError, match=f"'{name}' can't be reached: .*Copy the repository's files to a folder"
    ) as error:
        hub_folder(name, ["*"], ["*"])
    assert str(constants.HF_HUB_CACHE) in str(error.value)


def test_offline_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_folder("org/known", ["*"], ["*.json"]) == cache
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub_folder("org/unknown", ["*"], ["*"])


def test_what_is_asked_of_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question with a limit in seconds, then the files of the patterns alone."""
    asked: list[Any] = []
    files = ["config.json", "model.safetensors", "pytorch_model.bin"]
    snapshot_download = huggingface_hub.snapshot_download

    def model_info(self: Any, name: str, timeout: float) -> SimpleNamespace:
        asked.append((name, timeout))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def download(name: str, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        if local_files_only:
            return snapshot_download(name, local_files_only=True)
        asked.append(allow_patterns)
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_folder("org/new", ["*.json", "*.txt"], ["*.json"]) == cache
    assert asked[0][0] == "org/new" and asked[0][1] <= 10 and asked[1] == ["*.json", "*.txt"]
    hub_folder("org/new", ["*.json", *WEIGHT_FILES], ["*.json"])
    assert asked[-1] == ["*.json", "*.safetensors"], "the same weights in another format stay where they are"
    files.remove("model.safetensors")
    hub_folder("org/new", ["*.json", *WEIGHT_FILES], ["*.json"])
    assert asked[-1] == ["*.json", *WEIGHT_FILES]
    assert hub_file("org/new", "config.json") == cache / "config.json"
    with pytest.raises(FileNotFoundError, match="'org/new' has no file absent.bin"):
        hub_file("org/new", "absent.bin")


def test_a_download_that_breaks_off_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        raise (
            ConnectionError("reset by peer")
            if not local_files_only
            else huggingface_hub.errors.LocalEntryNotFoundError("no")
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=None))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="'org/new' can't be reached: reset by peer"):
        hub_folder("org/new", ["*"], ["*"])
