"""Which modules of a model a setting names: by name, by suffix or by glob."""

import difflib
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is a pattern, ends in it after a dot (`self_attn.q_proj`), or fits it as a glob."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def kind_of(name: str) -> str:
    """The last part of a module's name, which modules of all blocks share; numbers in a list are skipped."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def check_all_match(field: str, patterns: Iterable[str], names: Iterable[str], what: str = "linear") -> None:
    """Stop at the first pattern that matches none of the names.

    Args:
        field: the setting that the patterns come from.
        names: the names of the model's linears, or of what `what` says.

    Raises:
        ValueError: a pattern matches none; the message names the most similar kind of name, and all that exist.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            kinds = Counter(map(kind_of, names))
            near = difflib.get_close_matches(pattern, kinds, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listing = ", ".join(f"{kind} (x{count})" for kind, count in kinds.items())
            raise ValueError(f"{field}: {pattern!r} matches no {what} of this model.{hint} It has: {listing}")
