"""Answers are found in texts and graded as what they mean; nothing that they hold can stop the grading."""

import json
import math
import subprocess
import sys
import threading
from statistics import NormalDist

import pytest

from sorsa_ds.evaluate.grading.answers import announced, boxed, marked
from sorsa_ds.evaluate.grading.grader import Grader
from sorsa_ds.evaluate.tasks.generated import wilson_interval
from tests.helpers import small_data
from tests.helpers.grader_cases import ANNOUNCED, ANNOUNCED_WRONG, DIFFERENT, MATH, SAID, SAID_WRONG, SAME


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=20) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is so.\nThe answer is: 18", "18"),
        ("The answer is: 18.", "18"),
        ("The answer is: 3.5. Next comes", "3.5"),
        ("The answer is: 3\nThe answer is: 4", "4"),
        ("the answer is $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
        ("The answer is: $\\boxed{7}$.", "7"),
        ("So it is \\boxed{\\frac{1}{2}}, or \\boxed{\\{1, 2\\}}.", "\\{1, 2\\}"),
        ("The answer is therefore 3.\n#### 3", "3"),
        ("Thus 5 + 5 = 10\n#### 10", "10"),
        ("The answer is: 2**3 or 3 * 4 * 5.", "2**3 or 3 * 4 * 5"),
        ("The answer is: (2)*3*(4).", "(2)*3*(4)"),
        ("The answer is: $5!$!", "$5!$"),
        ("The answer is: 5!", "5 !"),
        ("The answer is: 1,000 dollars.", "1,000 dollars"),
        ("I do not know, perhaps 3", None),
        ("The answer is: $18.$ So it is.", "$18"),
        ("The answer is:\nThe answer is: 18", "18"),
        ("The answer is:\n\nSo it is.", None),
        ("The answer is:", None),
        ("It never closes: \\boxed{3", None),
        ("", None),
    ],
)
def test_the_last_announced_answer_counts(text, answer):
    assert announced(text) == answer


def test_boxes_are_balanced_and_marks_stand_at_the_beginning_of_a_line():
    assert boxed("\\boxed{1} then \\boxed{a_{b_{c}}}") == "a_{b_{c}}"
    assert boxed("\\fbox{4}") == "4"
    assert boxed("$\\boxed 9$") == "9"
    assert marked("a #### 3") is None
    assert marked("a\n####3\n#### 1,200 ") == "1,200"


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_what_means_the_same_is_right_either_way(grader, reference, answer):
    assert grader.grade(reference, answer) == "right"
    assert grader.grade(answer, reference) == "right"


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_what_means_something_else_is_wrong(grader, reference, answer):
    assert grader.grade(reference, answer) != "right"
    assert grader.grade(answer, reference) != "right"


@pytest.mark.parametrize(("reference", "text"), ANNOUNCED)
def test_an_answer_is_read_however_it_is_dressed(grader, reference, text):
    assert grader.grade(reference, announced(text)) == "right"


@pytest.mark.parametrize(("reference", "text"), ANNOUNCED_WRONG)
def test_no_dress_makes_a_wrong_answer_right(grader, reference, text):
    answer = announced(text)
    assert answer is None or grader.grade(reference, answer) != "right"


@pytest.mark.parametrize("colon", [":", ""])
@pytest.mark.parametrize(("reference", "said"), SAID)
def test_what_words_say_is_right(grader, reference, said, colon):
    answer = announced(f"So.\nThe answer is{colon} {said}")
    assert answer is not None
    assert grader.grade(reference, answer) == "right"


@pytest.mark.parametrize("colon", [":", ""])
@pytest.mark.parametrize(("reference", "said"), SAID_WRONG)
def test_near_misses_in_words_are_wrong(grader, reference, said, colon):
    answer = announced(f"So.\nThe answer is{colon} {said}")
    assert answer is None or grader.grade(reference, answer) != "right"


@pytest.mark.parametrize("origin", ["made", "real"])
def test_references_are_right_against_themselves(grader, origin, request, tmp_path):
    """Written another way, so that the expressions are compared and not the strings."""
    folder = small_data.gsm8k(tmp_path) if origin == "made" else request.getfixturevalue("shared_data") / "gsm8k"
    for file in ("train.jsonl", "test.jsonl"):
        lines = (folder / file).read_text().splitlines()
        for line in lines[:: max(1, len(lines) // 200)]:
            reference = marked(json.loads(line)["answer"])
            assert grader.grade(reference, announced(json.loads(line)["answer"])) == "right"
            assert grader.grade(reference, f"$\\frac{{{reference.replace(',', '')}}}{{1}}$") == "right", reference


def test_problems_in_the_format_of_math_are_right_against_themselves(grader):
    for row in MATH:
        assert grader.grade(boxed(row["solution"]), announced(f"Well.\n{row['solution']}")) == "right", row
        assert grader.grade(boxed(row["solution"]), announced(f"The answer is: ${boxed(row['solution'])}$.")) == "right"
        others = [boxed(other["solution"]) for other in MATH if other is not row]
        assert not any(grader.grade(boxed(row["solution"]), other) == "right" for other in others)


def test_what_is_no_expression_is_unparsable(grader):
    for text in ("", "$$", "\\frac{", "???"):
        assert grader.grade("3", text) == "unparsable", text


def test_an_endless_computation_is_ended_and_the_next_answer_graded():
    with Grader(seconds=3) as grader:
        assert grader.grade("1", "9^{9^{9^{9^9}}}") in ("timeout", "unparsable")
        assert grader.grade("2", "2.0") == "right"


def test_a_grader_works_outside_the_main_thread():
    told = []

    def work():
        with Grader() as grader:
            told.append(grader.grade("0.5", "\\frac{1}{2}"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == ["right"]


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 8), (700, 1319), (164, 164)])
def test_the_interval_is_wilsons(correct, total):
    """By what defines it: the observed rate lies z standard errors of the bound's own rate away from each bound."""
    rate, z = correct / total, NormalDist().inv_cdf(0.975)
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        assert abs(rate - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / total), abs=1e-12)


def test_graders_and_programs_start_without_torch():
    """Each of these processes is started anew: torch would take it seconds, and more memory than it may have."""
    programs = [f"sandbox.{name}" for name in ("runner", "jail", "walls", "seccomp", "program")]
    imports = "; ".join(f"import sorsa_ds.evaluate.{module}" for module in ["grading.equality", *programs])
    source = f"import sys; {imports}; print(sorted({{'torch', 'transformers', 'deepspeed'}} & {{*sys.modules}}))"
    told = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_of_nothing_nothing_is_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)
