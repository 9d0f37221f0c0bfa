"""What a user can get wrong, and how messages are worded."""


class UserError(ValueError):
    """A mistake in what a user gave; its message is one line: key or file, value, cure."""


def format_one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def format_count(count: int, noun: str) -> str:
    """Such as `1 item` and `2,000 items`.

    Args:
        count: how many.
        noun: one of them; more have an s.
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
