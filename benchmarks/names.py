"""What a run answers to names of settings that people bring from other trainers.

    python benchmarks/names.py

The names and the right answers are those of tests/helpers/foreign_names.py. The last line is one JSON object: `tried`;
`right_hint`: the answer names a right setting, or, where there is none, no setting as if it were one; `wrong_hint`: it
names another setting; `no_hint`: it names none although there is one.
"""

import argparse
import json
import re
from collections import Counter

from benchmarks.helpers.common import say
from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.train.options import TRAIN_OPTIONS
from tests.helpers.foreign_names import RIGHT


def main() -> None:
    """Try every name, print what is not right, and the JSON line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found: Counter[str] = Counter()
    for name, right in RIGHT.items():
        verdict = judge(name, right)
        found[verdict] += 1
        if verdict != "right_hint":
            say(f"{verdict}: {answer(name)}")
    print(json.dumps({"tried": len(RIGHT)} | {key: found[key] for key in ("right_hint", "wrong_hint", "no_hint")}))


def answer(name: str) -> str:
    """What a command line with this setting is refused with; empty where it is accepted."""
    try:
        load_settings(RunConfig, None, [(name, "1")], TRAIN_OPTIONS)
    except ValueError as error:
        return str(error)
    return ""


def judge(name: str, right: list[str]) -> str:
    """Whether the answer to a name is a right hint, a wrong one or none.

    Args:
        right: the settings and options that would be right to name.
    """
    said = answer(name).removeprefix(f"unknown setting {name}: ").rpartition(" (command line")[0]
    hint = re.match(r"(here it is |did you mean |there is none: )(.*)", said, re.DOTALL)
    if hint is None:
        return "no_hint" if right else "right_hint"
    settings = [*leaves(RunConfig), *(f"--{option}" for option in TRAIN_OPTIONS)]
    named = {one for one in settings if re.search(rf"(?<![\w.]){re.escape(one)}(?![\w]|\.\w)", hint[2])}
    if named & set(right):
        return "right_hint"
    if not right and hint[1] == "there is none: ":
        return "right_hint"
    return "wrong_hint" if named else "no_hint"


if __name__ == "__main__":
    main()
