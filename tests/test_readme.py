"""What the README shows is true: its commands parse, its example runs, its budgets hold."""

import re
import shlex

import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from cliplab import build
from cliplab.benchmark import PROTOCOLS
from cliplab.config import load_config
from cliplab.data.stand_ins import main as stand_ins
from cliplab.models.clip import CLIP
from cliplab.models.composed import ComposedRetriever
from cliplab.models.composers import COMPOSERS
from cliplab.registry import build_part
from cliplab.sweeps.spec import load_spec
from tests.conftest import ROOT, TINY
from tests.hugging_face import make_model, saved

README = (ROOT / "README.md").read_text()
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in BASH if line.startswith("python ")]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_name_scripts_configs_and_keys_that_exist(words):
    if words[1] == "-m":
        assert words[2] in ("venv", "cliplab.data.stand_ins", "cliplab.check")
        if words[2] == "cliplab.check":
            load_config(ROOT / words[words.index("--config") + 1], [word for word in words if "=" in word])
        elif words[2] != "venv":
            with pytest.raises(SystemExit) as stopped:
                stand_ins(["--help"])
            assert stopped.value.code == 0
        return
    assert (ROOT / words[1]).is_file()
    if words[1] == "sweep.py":
        load_spec(ROOT / words[words.index("--config") + 1], [word for word in words if "=" in word])
        return
    config = words[words.index("--config") + 1] if "--config" in words else "configs/quickstart.yaml"
    build.check_parts(load_config(ROOT / config, [word for word in words if "=" in word]))


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


def test_protocol_table_has_every_protocol():
    table = README.split("### Protocols")[1].split("## Tree")[0]
    assert {name for name in PROTOCOLS if f"`{name}`" in table} == set(PROTOCOLS)


def test_the_example_composer_works_and_its_options_are_checked():
    namespace: dict = {}
    exec(_example("class Weighted"), namespace)
    composers = COMPOSERS | {"weighted": namespace["Weighted"]}
    composer = build_part("composer", composers, {"name": "weighted", "text_weight": 0.7}, embed_dim=16)
    model = ComposedRetriever(CLIP(**TINY), composer, (0.5,) * 3, (0.5,) * 3)
    query = {
        "image": torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8),
        "text": torch.randint(1, 49000, (2, 32)),
    }
    torch.testing.assert_close(model.encode_query(query).norm(dim=-1), torch.ones(2))
    with pytest.raises(ValueError, match="did you mean 'text_weight'"):
        build_part("composer", composers, {"name": "weighted", "text_wieght": 0.7})


def test_the_calls_on_any_clip_work(tmp_path):
    folder = saved(make_model(CLIPModel), tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "pictures" / "picture.jpg")
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "PICTURES": tmp_path / "pictures"}
    places |= {"PICTURE.jpg": tmp_path / "pictures" / "picture.jpg"}
    code = _example("cliplab.load").replace('"ViT-B-32", "openai"', '"ViT-tiny-8-64"')
    namespace: dict = {}
    for name, path in places.items():
        code = code.replace(f'"{name}"', f"r'{path}'")
    exec(code, namespace)
    assert namespace["paths"] == [str(places["PICTURE.jpg"])] and len(namespace["blocks"]) == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def _example(marker: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(block for block in blocks if marker in block)


def test_a_reader_finds_things_early():
    lines = README.splitlines()
    assert lines.index("## Install") < 30
    assert lines.index("## Run") < 40
    assert lines.index("## Results") < 60
