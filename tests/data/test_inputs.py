import pytest
from PIL import Image

from cliplab.data.inputs import paired, pictures_below
from cliplab.errors import UserError

ONE = Image.new("RGB", (3, 2))


@pytest.mark.parametrize(
    ("images", "text", "expected"),
    [
        ("a.jpg", None, (["a.jpg"], None, "images")),
        ((ONE, "b.jpg"), None, ([ONE, "b.jpg"], None, "images")),
        (None, "red", (None, ["red"], "text")),
        (ONE, "red", ([ONE], ["red"], "multimodal")),
        (["a.jpg", ONE], ("red", ""), (["a.jpg", ONE], ["red", ""], "multimodal")),
    ],
)
def test_lists_and_kind(images, text, expected):
    assert paired(images, text) == expected


@pytest.mark.parametrize(
    ("images", "text"), [(None, None), ([], None), ([1], None), (None, b"red"), (["a"], "red"), (["a"], ["b", "c"])]
)
def test_what_does_not_fit_is_an_error(images, text):
    with pytest.raises(UserError):
        paired(images, text)


def test_pictures_below(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.JPG", "more/a.png", "more/._a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert pictures_below(tmp_path) == [str(tmp_path / "b.JPG"), str(tmp_path / "more" / "a.png")]
