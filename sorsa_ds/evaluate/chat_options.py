"""The command line of launch/chat.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sorsa_ds.evaluate.options import Style
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = (
    "Ask a model, line by line; the answers are printed as they come. An empty line begins a new conversation. "
    "Questions may come through a pipe: `echo 'What is 2 plus 3?' | python launch/chat.py --model runs/NAME`."
)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The command line.

    prompt: None: the style of the run's data; else the chat template, where the tokenizer has one, else `plain`.
    temperature: 0: the most probable token each time.
    """

    model: str
    base: str | None = None
    checkpoint: str | None = None
    compare: bool = False
    prompt: Style | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    trust_remote_code: bool = False


def parse(argv: Sequence[str]) -> ChatOptions:
    """Read the command line. `--help`, and what argparse refuses, end the process.

    Raises:
        ValueError: a number is out of its range.
    """
    parser = OptionParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--model", required=True, help="a run's folder, an adapter's, or a model's folder or name on the hub")
    add("--base", help="the base model of a run or an adapter, if it is no longer where it was")
    add(
        "--checkpoint",
        help="checkpoint of a run, finished or not: best, latest or a number of steps (default: its end)",
    )
    add("--compare", action="store_true", help="also print what the base model answers to the same question")
    add("--prompt", choices=get_args(Style), help="how a question is put (default: as in training)")
    add("--max_new_tokens", type=int, default=512, help="the most tokens of an answer (default 512)")
    add("--temperature", type=float, default=0.0, help="0 (default): the most probable token each time")
    add("--seed", type=int, default=0, help="seed of the sampling, where the temperature is above 0")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="dtype of the matrix products")
    add("--trust_remote_code", action="store_true", help="allow Python code that comes with the model")
    options = ChatOptions(**vars(parser.parse_args(argv)))
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {options.max_new_tokens}: at least 1 is needed")
    if not 0 <= options.temperature <= 100:
        raise ValueError(f"--temperature is {options.temperature}: a number from 0 to 100 is needed")
    return options
