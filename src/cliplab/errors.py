"""The one exception that means: the user can mend this."""

import re


class UserError(ValueError):
    """A mistake in what the user gave: a config key, a file, an id.

    The message names what was given, what was expected and the way out. Entry scripts turn it, and only it, into exit
    code 2 without a traceback (`debug=true` shows the traceback).
    """


def message_of(error: UserError) -> str:
    """The message alone, also where a loader's worker process wrapped it in its traceback."""
    return re.split(r"(?:^|\n)(?:[\w.]+\.)?UserError: ", str(error))[-1].strip()
