"""Small data in the layouts of published sets, made on the spot: GSM8K, HumanEval, MMLU and Alpaca."""

import gzip
import json
from pathlib import Path

from sorsa_ds.data.word_problems import word_problems

EXAMPLES = [
    {
        "question": "Mara picked 48 apples in May, and half as many in June. How many are these in all?",
        "answer": "In June she picked 48/2 = <<48/2=24>>24 apples.\nThese are 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {
        "question": "A ride of an hour costs $12. What do 50 minutes cost?",
        "answer": "A minute costs 12/60 = $<<12/60=0.2>>0.2.\nSo it is 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
    },
]
"""Word problems whose solutions have GSM8K's annotations of computations."""
QUESTIONS = [
    {"question": "Ivo’s hens lay 16 eggs a day, and 7 are eaten. How many are left?", "answer": "16-7=9.\n#### 9"},
    {"question": "A coat takes 2 bolts of blue and half as many of white. How many?", "answer": "2+1=3.\n#### 3"},
    {"question": "A house of $80,000 is worth 150% more. What now?", "answer": "80,000*2.5=200,000.\n#### 200,000"},
]
PROGRAMS = [
    (
        "def total(numbers: list) -> int:\n",
        "Sum of the numbers.\n    >>> total([1, 2])\n    3",
        "    result = 0\n    for number in numbers:\n        result += number\n    return result\n",
        "candidate([1, 2, 3]) == 6 and candidate([-1]) == -1",
    ),
    (
        "def is_palindrome(text: str) -> bool:\n",
        "Whether it reads the same backwards.",
        "    return text == text[::-1]\n",
        "candidate('abba') and not candidate('ab')",
    ),
    (
        "from math import sqrt\n\n\ndef is_prime(n: int) -> bool:\n",
        "Whether n has two divisors.",
        "    if n < 2:\n        return False\n    return all(n % k for k in range(2, int(sqrt(n)) + 1))\n",
        "candidate(97) and not candidate(91)",
    ),
    (
        "def half(x):\n    return x / 2\n\n\ndef quarter(x: float) -> float:\n",
        "A quarter; `half` may be used.",
        "    def twice(f, y):\n        return f(f(y))\n\n    return twice(half, x)\n",
        "abs(candidate(8) - 2) < 1e-9",
    ),
]
"""Functions as in HumanEval: head, docstring, body, and what must hold."""


def write_lines(file: Path, rows: list[dict]) -> Path:
    """A JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def gsm8k(folder: Path, generated: int = 40) -> Path:
    """Generated word problems behind the written ones: `train.jsonl` and a `test.jsonl` of a quarter as many."""
    rows = [{key: row[key] for key in ("question", "answer")} for row in word_problems(0, generated + generated // 4)]
    write_lines(folder / "train.jsonl", EXAMPLES + rows[:generated])
    write_lines(folder / "test.jsonl", QUESTIONS + rows[generated:])
    return folder


def humaneval(folder: Path) -> Path:
    """`HumanEval.jsonl.gz` with the programs above."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        for number, (head, told, body, holds) in enumerate(PROGRAMS):
            row = {
                "task_id": f"HumanEval/{number}", "prompt": f'{head}    """{told}\n    """\n',
                "entry_point": head.rpartition("def ")[2].partition("(")[0], "canonical_solution": body,
                "test": f"def check(candidate):\n    assert {holds}\n",
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return folder


def mmlu(folder: Path) -> Path:
    """MMLU's folders `dev`, `val` and `test`, each with a CSV file for 57 subjects: 5 examples, 3 questions or more."""
    subjects = ["abstract_algebra", *(f"subject_{number:02}" for number in range(56))]
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for place, subject in enumerate(subjects):
            count = 5 if split == "dev" else 3 + place % 4
            lines = (
                f'"What, is {n}\nand ""{n}""?",{n},{n + 1},"{n}, or so",N/A,{"ABCD"[n % 4]}\n' for n in range(count)
            )
            (folder / split / f"{subject}_{split}.csv").write_text("".join(lines))
    return folder


def alpaca(folder: Path) -> Path:
    """`alpaca_en_demo.json`: instructions, some with an input, some without an output."""
    rows = [
        {
            "instruction": f"Add {n} to {'it' if n % 3 else n}, {{please}}.",
            "input": f"It is {n}.\nSo — 日本 🙂" if n % 3 else "",
            "output": "" if n % 10 == 9 else f"That\tis {2 * n}.\r\n\n* so  it is",
        }
        for n in range(30)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alpaca_en_demo.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder
