"""HumanEval: Python functions to be completed, judged by running their tests (Chen et al. 2021): pass@1."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sorsa_ds.evaluate.datasets import complete_rows, first_rows, open_data, rows_of
from sorsa_ds.evaluate.options import Options, Style
from sorsa_ds.evaluate.prompts import render_question
from sorsa_ds.evaluate.sandbox.runner import Sandbox
from sorsa_ds.evaluate.tasks.generated import Generated, Judge, Judgement, Question
from sorsa_ds.evaluate.tasks.task import Setting

HUB = "openai/openai_humaneval"
COLUMNS = ("task_id", "prompt", "test", "entry_point")
INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{prompt}```"
)  # fmt: skip

_BLOCK = re.compile(r"(?:^([ \t]*))?```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE)
_END_OF_FUNCTION = re.compile(r"\n(?=[^\s#)\]}])")
_START_OF_CODE = re.compile(r"^(?:from|import|async def|def|class|@)\b", re.MULTILINE)


def build(options: Options, setting: Setting) -> Generated:
    """The task of all problems. The sandbox is tried first: where it does not hold, nothing begins.

    Raises:
        ValueError: the data cannot be read, or programs cannot be walled in on this machine.
    """
    sandbox = Sandbox()
    splits = open_data(options.data or HUB, None, options.columns)
    found, notes = complete_rows(first_rows(rows_of(splits, ("test",), COLUMNS), options.limit), COLUMNS)
    rows = [row.cells for row in found]
    questions = [
        Question(row["task_id"], _prompt(options.style, setting, row), f"{row['entry_point']}\n{row['test']}")
        for row in rows
    ]
    by_id = {row["task_id"]: row for row in rows}
    return Generated(
        questions, setting, options.new_tokens, judge_programs(by_id, sandbox), [sandbox.protection, *notes]
    )


@contextmanager
def judge_programs(rows: dict[str, dict], sandbox: Sandbox) -> Iterator[Judge]:
    """A judge that runs answers with the tests of their problems. `rows` has the problems by id."""

    def judged(id_: str, text: str) -> Judgement:
        told = sandbox.run(program(rows[id_], code_of(rows[id_], text)))
        outcomes = {"passed": "right", "timeout": "timeout", "SyntaxError": "unparsable"}
        outcomes["IndentationError"] = outcomes["SyntaxError"]
        return Judgement(outcomes.get(told, "wrong"), {"ended_with": told})

    yield judged


def program(row: dict, code: str) -> str:
    """The program that is run: the code, and behind it the problem's tests."""
    return f"{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def code_of(row: dict, text: str) -> str:
    """The code in an answer: the last code block that defines the function, else code that does, else its body.

    The imports and helpers that stand before the function in the problem are put before a whole function too. A method
    of a class does not count as the function, since it is not what was asked for.
    """
    function = re.compile(rf"^(?:async )?def {re.escape(row['entry_point'])}\b", re.MULTILINE)
    before = row["prompt"][: list(function.finditer(row["prompt"]))[-1].start()]
    blocks = [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in _BLOCK.findall(text)]
    for block in reversed(blocks):
        if function.search(block):
            return f"{before}\n{block}"
    if not blocks and (defined := function.search(text)):
        first = _START_OF_CODE.search(text)
        assert first is not None, "the definition of the function is code"
        header = text[first.start() : defined.end()]
        return f"{before}\n{header}{_function(text[defined.end() :])}"
    return row["prompt"] + _function(blocks[-1] if blocks else text)


def _function(text: str) -> str:
    """The text up to the first line that no longer belongs to the function."""
    return _END_OF_FUNCTION.split(text, maxsplit=1)[0]


def _prompt(style: Style, setting: Setting, row: dict) -> str:
    if style == "plain":  # a base model continues the function itself
        return row["prompt"]
    return render_question(style, setting.tokenizer, row["task_id"], INSTRUCTION.format(prompt=row["prompt"]), [])
