"""The graders' verdicts where the right verdict is known: on reference solutions, on near misses, on programs.

    python benchmarks/graders.py --data FOLDER     FOLDER holds gsm8k/ and humaneval/

The last line is one JSON object of rates. `gsm8k_references`: every reference solution of GSM-8K against itself, with
its answer as it is and as a fraction. `math_references`: the same for problems in MATH's format, those of
tests/helpers/grader_cases.py or, with --math, a folder of yours. `near_misses_passed`: pairs of answers that mean the
same, and pairs that do not. `humaneval_canonical` and `humaneval_empty`: pass@1 of HumanEval's own solutions, and of
functions that do nothing.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

from benchmarks.helpers.common import say
from sorsa_ds.evaluate.grading.answers import announced, boxed
from sorsa_ds.evaluate.grading.grader import Grader
from sorsa_ds.evaluate.sandbox.runner import Sandbox
from sorsa_ds.evaluate.tasks import math
from sorsa_ds.evaluate.tasks.gsm8k import solution
from sorsa_ds.evaluate.tasks.humaneval import code_of, program
from tests.helpers.grader_cases import ANNOUNCED, ANNOUNCED_WRONG, DIFFERENT, MATH, SAID, SAID_WRONG, SAME


def main() -> None:
    """Measure every rate, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and humaneval/")
    parser.add_argument("--math", type=Path, help="folder of MATH as it was published")
    given = parser.parse_args()
    with Grader() as grader:
        figures = {
            "gsm8k_references": gsm8k(grader, given.data / "gsm8k"),
            "math_references": mathematics(grader, given.math),
            "near_misses_passed": near_misses(grader),
        }
    figures |= humaneval(given.data / "humaneval" / "HumanEval.jsonl.gz")
    print(json.dumps(figures))


def gsm8k(grader: Grader, folder: Path) -> float:
    """Rate of GSM-8K's references that are graded as right, each as the solution has it and rewritten as a fraction."""
    right = total = 0
    for file in ("train.jsonl", "test.jsonl"):
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)["answer"]
            reference = solution(answer)[1]
            rewritten = f"The answer is: $\\frac{{{reference.replace(',', '')}}}{{1}}$."
            for text in (answer, rewritten):
                total += 1
                right += grader.grade(reference, announced(text)) == "right"
    return _rate("GSM-8K references", right, total)


def mathematics(grader: Grader, folder: Path | None) -> float:
    """Rate of MATH's solutions that are graded as right against their own boxed answers, boxed and announced."""
    rows = MATH
    if folder is not None:
        rows = [row for split in math.published(folder).values() for row in split]
    right = total = 0
    for row in rows:
        reference = math.reference_of(row)
        for text in (row["solution"], f"The answer is: ${boxed(row['solution'])}$."):
            total += 1
            right += grader.grade(reference, announced(text)) == "right"
    return _rate("MATH references", right, total)


def near_misses(grader: Grader) -> float:
    """Rate of right verdicts on pairs of equal and of different answers, both ways round, and on answers in texts."""
    cases = [(*pair, True) for pair in SAME] + [(*pair, False) for pair in DIFFERENT]
    passed = [
        (grader.grade(first, second) == "right") == equal
        for one, other, equal in cases
        for first, second in ((one, other), (other, one))
    ]
    right = [*ANNOUNCED, *((reference, f"The answer is: {said}") for reference, said in SAID)]
    wrong = [*ANNOUNCED_WRONG, *((reference, f"The answer is: {said}") for reference, said in SAID_WRONG)]
    texts = [(*case, True) for case in right] + [(*case, False) for case in wrong]
    passed += [(grader.grade(one, announced(text) or "") == "right") == right for one, text, right in texts]
    return _rate("near misses", sum(passed), len(passed))


def humaneval(file: Path) -> dict[str, float]:
    """Rates of HumanEval's programs that pass: its own solutions, bare and in a code block, and empty bodies."""
    sandbox = Sandbox()
    say(sandbox.protection)
    with gzip.open(file) as lines:
        rows = [json.loads(line) for line in lines]
    whole = "```python\n{prompt}{canonical_solution}\n```"
    kinds = {"canonical": "{canonical_solution}", "in a code block": whole, "empty": "    pass\n"}
    rates = {}
    for kind, answer in kinds.items():
        told = {row["task_id"]: sandbox.run(program(row, code_of(row, _filled(answer, row)))) for row in rows}
        passed = sum(ended == "passed" for ended in told.values())
        if kind != "empty":
            for name, ended in told.items():
                if ended != "passed":
                    say(f"{name}: {ended}")
        rates[kind] = _rate(f"HumanEval, {kind}", passed, len(told))
    return {
        "humaneval_canonical": min(rates["canonical"], rates["in a code block"]), "humaneval_empty": rates["empty"]
    }  # fmt: skip


def _filled(answer: str, row: dict) -> str:
    """An answer whose `{name}`s are replaced by the row's texts, which may hold braces themselves."""
    for name in ("prompt", "canonical_solution"):
        answer = answer.replace(f"{{{name}}}", row[name])
    return answer


def _rate(what: str, right: int, total: int) -> float:
    say(f"{what}: {right} of {total} after {time.process_time():.0f} s of this process")
    return right / total


if __name__ == "__main__":
    main()
