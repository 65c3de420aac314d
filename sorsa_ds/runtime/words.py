"""Words for messages."""


def cut(text: str, most: int = 200) -> str:
    """A text that others have written, cut where it is longer than a message should be."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
