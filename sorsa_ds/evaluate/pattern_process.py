"""The child process of `sorsa_ds.evaluate.peft_adapter`, in which an adapter's patterns meet a model's names.

A regular expression can take longer than anybody waits for a single name; the limits of
`sorsa_ds.runtime.line_process` end that.
"""

import re
from typing import Any

from sorsa_ds.runtime.line_process import serve


def match_all(question: dict[str, Any]) -> dict[str, str]:
    """Match every pattern with every name, as PEFT will.

    Args:
        question: `patterns` and `names`, lists of text.

    Returns:
        `fault`: what is wrong with the first pattern that is no regular expression; empty where all are.
    """
    for pattern in question["patterns"]:
        try:
            for compiled in (re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")):
                for name in question["names"]:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError) as error:
            return {"fault": f"{pattern!r} is no regular expression: {error}"}
    return {"fault": ""}


if __name__ == "__main__":
    serve(match_all)
