import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.checkpoints.torch_file import read_torch_file
from cliplab.models.checkpoints.torchscript import is_torchscript, read_torchscript
from cliplab.models.checkpoints.weights import read_file
from tests.models.checkpoints.test_weights import CONFIG, same
from tests.oracles import open_clip_model, perturb, pictures, sentences


class Archive(nn.Module):
    """What OpenAI published: the model with three numbers beside its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual, self.transformer = model.visual, model.transformer
        self.token_embedding, self.ln_final = model.token_embedding, model.ln_final
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection
        self.logit_scale = model.logit_scale
        for name, number in (("input_resolution", 16), ("context_length", 6), ("vocab_size", 20)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


def open_clips() -> Any:
    torch.manual_seed(0)
    model = open_clip_model(CONFIG).eval()
    perturb(model)
    return model


@pytest.fixture(autouse=True)
def no_code_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an archive must not be compiled")

    monkeypatch.setattr(torch.jit, "load", refuse)


def test_a_traced_model(tmp_path: Path) -> None:
    model, file = open_clips(), tmp_path / "traced.pt"
    inputs = (pictures(1, 16), sentences(1, 6, 20))
    torch.jit.trace(model, inputs, check_trace=False).save(file)
    assert is_torchscript(file)
    weights = read_file(file)
    assert same(dict(weights.state_dict), model.state_dict())
    assert weights.quick_gelu is None, "who saved it is not known"


@pytest.mark.parametrize("half", [False, True])
def test_openais_layout(tmp_path: Path, half: bool) -> None:
    model, file = open_clips(), tmp_path / "openai.pt"
    if half:
        model.half().float()  # what is stored is exactly what fp16 can say
    expected = {key: value.half() if half else value for key, value in model.state_dict().items()}
    archive = torch.jit.trace(Archive(model), pictures(1, 16), check_trace=False)
    (archive.half() if half else archive).save(file)
    assert read_torch_file(file).keys() == {*expected, "input_resolution", "context_length", "vocab_size", *masks(file)}
    weights = read_file(file)
    assert same(dict(weights.state_dict), expected)
    assert {value.dtype for value in weights.state_dict.values()} == {torch.float16 if half else torch.float32}
    assert weights.quick_gelu is True, "OpenAI's models were trained with it"


def masks(file: Path) -> set[str]:
    return {key for key in read_torch_file(file) if key.endswith("attn_mask")}


def test_a_scripted_module_of_every_kind_of_tensor(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("ids", torch.arange(5))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.weight = nn.Parameter(torch.randn(4, 6).t().contiguous().t())  # not contiguous
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.name, self.numbers = "text", [1, 2, 3]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = nn.Sequential(Inner(), Inner().to(torch.bfloat16), Inner().double())
    torch.jit.script(model).save(tmp_path / "a.pt")
    assert same(read_torchscript(tmp_path / "a.pt"), model.state_dict())


def test_tensors_that_share_their_memory(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(4, 4))
            self.other = nn.Parameter(self.one.detach()[2:])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.one @ self.other.T

    model = Tied()
    torch.jit.script(model).save(tmp_path / "a.pt")
    assert same(read_torchscript(tmp_path / "a.pt"), model.state_dict())


def test_a_state_dict_is_no_archive(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(open_clips().state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert not is_torchscript(tmp_path / "a.pt")
    (tmp_path / "text.pt").write_text("no archive")
    assert not is_torchscript(tmp_path / "text.pt")


# Archives that want more than to be read


class Payload:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def write_archive(file: Path, data: bytes, **others: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/code/__torch__.py", "")
        for name, content in others.items():
            archive.writestr(f"a/data/{name}", content)


def test_code_in_its_data_is_refused_and_not_run(tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.pt", tmp_path / "was-run"
    write_archive(file, pickle.dumps(Payload(marker), protocol=2))
    assert is_torchscript(file)
    with pytest.raises(UserError, match=r"can't read .*evil\.pt: .*pickled code, which is never run"):
        read_file(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "else the file above would prove nothing"


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(V1\ntR.",
        b"ctorch\nload\n(Va\ntR.",
        b"ctorch._utils\n_rebuild_parameter\n(tR.",
        b"c__torch__.a\nB\n)\x81}Vx\ncos\ngetcwd\n)Rsb.",
        b"cos\nsystem\n.",
        b"",
        b"\x80\x02.",
        b"K\x01.",
    ],
    ids=str,
)
def test_anything_else_than_modules_of_tensors_is_refused(tmp_path: Path, pickled: bytes) -> None:
    file = tmp_path / "a.pt"
    write_archive(file, pickled)
    with pytest.raises(UserError) as error:
        read_file(file)
    assert str(file) in str(error.value)


def test_the_code_of_the_archive_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    model = nn.Sequential(nn.Linear(2, 2))
    torch.jit.script(model).save(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(file, "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, b"this is no code" if "/code/" in name else whole.read(name))
    assert same(read_torchscript(file), model.state_dict())


@pytest.mark.parametrize("without", ["data.pkl", "data/0"])
def test_parts_that_are_missing_are_an_error(tmp_path: Path, without: str) -> None:
    file = tmp_path / "a.pt"
    torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(file, "w") as broken:
        for name in whole.namelist():
            if not name.endswith(without):
                broken.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="can't read") as error:
        read_file(file)
    assert str(file) in str(error.value)


def test_a_tensor_larger_than_its_data_is_an_error(tmp_path: Path) -> None:
    """Else it would show memory that is not its own."""
    file = tmp_path / "a.pt"
    torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(file, "w") as broken:
        for name in whole.namelist():
            data = whole.read(name)
            broken.writestr(name, data[: len(data) // 2] if name.endswith("data/0") else data)
    with pytest.raises(UserError, match="can't read"):
        read_file(file)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_an_archive_that_is_cut_off_is_named(tmp_path: Path, share: float) -> None:
    file = tmp_path / "a.pt"
    torch.jit.trace(Archive(open_clips()), pictures(1, 16), check_trace=False).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="can't read") as error:
        read_file(file)
    assert str(file) in str(error.value)
