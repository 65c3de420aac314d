"""The command line of launch/chat.py."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

from sorsa_ds.evaluate.options import Style
from sorsa_ds.run.command_options import ModelDtype, add_model_options
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
    dtype: ModelDtype = "auto"
    trust_remote_code: bool = False


def parse(argv: Sequence[str]) -> ChatOptions:
    """Read the command line. `--help`, and what argparse refuses, end the process.

    Raises:
        ValueError: a number is out of its range.
    """
    parser = OptionParser(description=DESCRIPTION, argument_default=argparse.SUPPRESS)  # the defaults: `ChatOptions`
    add, default = parser.add_argument, {field.name: field.default for field in fields(ChatOptions)}
    add_model_options(parser)
    add("--compare", action="store_true", help="also print what the base model answers to the same question")
    add("--prompt", choices=get_args(Style), help="how a question is put (default: as in training)")
    add("--max_new_tokens", type=int, help=f"the most tokens of an answer (default: {default['max_new_tokens']})")
    add("--temperature", type=float, help="0 (default): the most probable token each time")
    add("--seed", type=int, help=f"seed of the sampling, where the temperature is above 0 (default: {default['seed']})")
    options = ChatOptions(**vars(parser.parse_args(argv)))
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {options.max_new_tokens}: at least 1 is needed")
    if not 0 <= options.temperature <= 100:
        raise ValueError(f"--temperature is {options.temperature}: a number from 0 to 100 is needed")
    return options
