"""What a user can get wrong, and how it is worded."""


class UserError(ValueError):
    """A mistake in what a user gave; its message is one line: key or file, value, cure."""


def format_one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
