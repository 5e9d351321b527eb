from pathlib import Path

import pytest

from cliplab.data.images import ImageFolder
from cliplab.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    names = ["a.jpg", "b.JPEG", "c.png", "dress/d.jpg", "shirt/e.png", "shirt/deep/f.png", "g.gif", "h.txt", "i.v2.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * number)
    return ImageFolder(tmp_path)


def test_a_folder_knows_its_images_by_name_and_those_of_its_sub_folders(folder: ImageFolder) -> None:
    assert len(folder) == 6
    assert [name for name in "abcdefgh" if name in folder] == ["a", "b", "c", "d", "e"]
    assert "i.v2" in folder and "i" not in folder
    assert folder.path("a") == str(folder.root / "a.jpg")
    assert folder.path("b") == str(folder.root / "b.JPEG")
    assert folder.path("e") == str(folder.root / "shirt" / "e.png")


def test_a_folder_may_be_given_relative_to_here(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.root)
    assert ImageFolder(Path(".")).sizes() == folder.sizes()
    monkeypatch.chdir(folder.root.parent)
    assert ImageFolder(Path(folder.root.name)).sizes() == folder.sizes()


def test_an_image_that_is_not_there_is_named(folder: ImageFolder) -> None:
    with pytest.raises(UserError, match=f"^no image 'zzz' in {folder.root}$"):
        folder.path("zzz")


def test_missing_names_each_once_sorted(folder: ImageFolder) -> None:
    assert folder.missing(["z", "a", "f", "z", "e"]) == ["f", "z"]
    assert folder.missing([]) == []


def test_sizes_are_sorted_by_name(folder: ImageFolder) -> None:
    assert folder.sizes() == [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4), ("i.v2", 8)]


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "nowhere")
    assert len(folder) == 0 and folder.missing(["a"]) == ["a"]


def test_a_folder_is_listed_once(folder: ImageFolder) -> None:
    (folder.root / "new.png").touch()
    assert "new" not in folder
    assert "new" in ImageFolder(folder.root)
