import os
from pathlib import Path

import pytest
import torch

from cliplab.errors import UserError
from cliplab.models.checkpoints.torch_file import read_torch_file


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_tensors_and_builtins_come_back(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"weight": torch.arange(3), "config": {"lr": 0.1}}, file)
    content = read_torch_file(file)
    assert content["weight"].tolist() == [0, 1, 2]
    assert content["config"] == {"lr": 0.1}


def test_pickled_code_is_refused_and_not_run(tmp_path):
    file, marker = tmp_path / "a.pt", tmp_path / "was-run"
    torch.save({"weight": Payload(marker)}, file)
    with pytest.raises(UserError, match=r"a\.pt.*never run"):
        read_torch_file(file)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_files_are_named(tmp_path, content):
    file = tmp_path / "a.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"can't read .*a\.pt"):
        read_torch_file(file)


def test_truncated_files_are_named(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"weight": torch.randn(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"can't read .*a\.pt"):
        read_torch_file(file)
