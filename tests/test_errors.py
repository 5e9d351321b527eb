import pytest
from torch._utils import ExceptionWrapper

from cliplab.errors import UserError, message_of


def from_worker(error: Exception, cause: Exception | None = None) -> UserError:
    """What torch raises in the main process when a loader's worker raised `error`."""
    try:
        raise error from cause
    except Exception:  # noqa: BLE001 - torch wraps whatever comes
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError) as raised:
        wrapper.reraise()
    return raised.value


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("text", ["no file a.json", "one line\nand another", "", "a UserError: in the middle"])
def test_message_of_a_plain_error_is_its_text(text: str) -> None:
    assert message_of(UserError(text)) == text


@pytest.mark.parametrize("text", ["no file a.json", "first line\n  second line"])
def test_message_of_an_error_from_a_loader_worker(text: str) -> None:
    wrapped = from_worker(UserError(text))
    assert "Traceback" in str(wrapped)
    assert message_of(wrapped) == text


def test_message_of_an_error_with_a_cause_from_a_loader_worker() -> None:
    wrapped = from_worker(UserError("can't read a.jpg"), cause=UserError("the cause"))
    assert message_of(wrapped) == "can't read a.jpg"
