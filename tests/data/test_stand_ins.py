import json

import pytest
from PIL import Image

from cliplab.data.fashioniq import FashionIQ
from cliplab.data.stand_ins import main, make_stand_ins
from cliplab.errors import UserError


@pytest.fixture
def annotations(tmp_path):
    root = tmp_path / "fashioniq"
    (root / "image_splits").mkdir(parents=True)
    for category in ("dress", "shirt", "toptee"):
        for split in ("train", "val", "test"):
            names = [f"{category[0]}{split[:2]}{number}" for number in range(5)]
            (root / "image_splits" / f"split.{category}.{split}.json").write_text(json.dumps(names))
    return root


def test_every_id_gets_the_same_picture_each_time_and_the_folder_is_marked(annotations, tmp_path):
    photographs = tmp_path / "photographs" / "class"
    photographs.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photographs / f"{number}.png")
    assert make_stand_ins(annotations, photographs.parent, tmp_path / "out") == 45
    first = {path.name: path.resolve().name for path in (tmp_path / "out").glob("*.png")}
    main(["--annotations", str(annotations), "--photographs", str(photographs), "--out", str(tmp_path / "again")])
    assert first == {path.name: path.resolve().name for path in (tmp_path / "again").glob("*.png")}
    assert len(first) == 45
    assert set(first.values()) == {"0.png", "1.png", "2.png"}
    assert FashionIQ(annotations, tmp_path / "out").stand_ins
    assert not FashionIQ(annotations, photographs).stand_ins


def test_no_photographs_is_an_error(annotations, tmp_path):
    with pytest.raises(UserError, match="no photographs"):
        make_stand_ins(annotations, tmp_path / "nowhere", tmp_path / "out")


def test_a_folder_of_real_photographs_is_left_alone(annotations, tmp_path):
    out = tmp_path / "real"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "dtr0.jpg")
    with pytest.raises(UserError, match="new or empty folder"):
        make_stand_ins(annotations, out, out)
    assert not (out / "dtr0.jpg").is_symlink()
