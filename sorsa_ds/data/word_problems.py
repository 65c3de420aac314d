"""The embedded data: generated grade-school word problems with worked solutions (GSM-Symbolic templates)."""

import re
from collections.abc import Iterator
from itertools import islice

from datasets import Dataset

from sorsa_ds.config.schema import EMBEDDED_DATA
from sorsa_ds.runtime.extras import check_extra

PROBLEMS = 112
"""Number of problems: 96 to train on and 16 held out, with the default data.eval_size."""

_HINT = " Give the result as your final answer. Do not include units."
_ROUNDING_NOISE = re.compile(r"\d\.\d{4,}")


def word_problems(seed: int, size: int = PROBLEMS) -> Dataset:
    """Generate `size` different problems with the columns question, answer and gold.

    The answer is the worked solution, which ends with `#### n`; gold is n.

    Raises:
        ValueError: the package that generates them is not installed.
    """
    check_extra("reasoning_gym", f"data.path={EMBEDDED_DATA}")
    rows = list(islice(_good_problems(seed, 2 * size), size))
    assert len(rows) == size, "too few of the generated problems are good"
    return Dataset.from_list(rows)


def _good_problems(seed: int, size: int) -> Iterator[dict[str, str]]:
    """Generate `size` problems, and yield those that are neither repeats nor slips of the templates.

    About one problem in twenty is a slip: its solution ends in another spelling of the number (`8.0` for 8), or shows
    the rounding noise of binary fractions (`18.000000000000004 hours`).
    """
    import reasoning_gym  # imported here: it takes a second, and only runs on this data need it

    seen = set()
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=size):
        question, solution = item["question"].removesuffix(_HINT), item["metadata"]["answer_cot"]
        good = solution.endswith(f"\n#### {item['answer']}") and not _ROUNDING_NOISE.search(question + solution)
        if good and question not in seen:
            seen.add(question)
            yield {"question": question, "answer": solution, "gold": item["answer"]}
