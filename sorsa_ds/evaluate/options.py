"""The command line of launch/evaluate.py."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from sorsa_ds.config.declare import MOST_SEED, check_count
from sorsa_ds.run.command_options import ModelDtype, add_model_options
from sorsa_ds.runtime.console import OptionParser

DESCRIPTION = "Evaluate a model: deepspeed launch/evaluate.py --model runs/NAME --task gsm8k (or torchrun, or python)."

TaskName = Literal["gsm8k", "math", "humaneval", "mmlu", "mt_bench", "loss", "drift"]
Style = Literal["papers", "chat", "plain"]
Backend = Literal["transformers", "vllm"]
GENERATED = ("gsm8k", "math", "humaneval", "mt_bench")
UNGRADED = ("mt_bench", "loss", "drift")
"""Tasks whose samples are neither right nor wrong."""

NEW_TOKENS = {"gsm8k": 1024, "math": 2048, "humaneval": 2048, "mt_bench": 1024}
"""The most tokens that an answer may have by default, as in the papers; of mt_bench as in FastChat."""

SHOTS = {"mmlu": 5}
"""Number of few-shot examples by default; tasks that are not named here have none."""

WINDOW = 1024
"""Tokens that the loss sees at once by default, where the model takes as many."""

SAMPLES, SAMPLE_TOKENS = 64, 256
"""How many samples of its own the base model writes for the drift by default, and how many tokens each has at most."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line, with their defaults. None stands for an option that was not given."""

    model: str
    task: TaskName
    data: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    checkpoint: str | None = None
    limit: int | None = None
    num_few_shot: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    prompt: Style | None = None
    window: int | None = None
    stride: int | None = None
    samples: int | None = None
    sample_tokens: int | None = None
    output: Path | None = None
    backend: Backend = "transformers"
    dtype: ModelDtype = "auto"
    seed: int | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_temperature: float | None = None
    allow_code_execution: bool = False
    trust_remote_code: bool = False

    def __post_init__(self):
        for name in ("limit", "batch_size", "max_new_tokens", "window", "stride", "samples", "sample_tokens"):
            value = getattr(self, name)
            if value is not None:
                check_count(f"--{name}", value)
        if self.seed is not None:
            check_count("--seed", self.seed, least=0, most=MOST_SEED)
        if self.num_few_shot is not None:
            check_count("--num_few_shot", self.num_few_shot, least=0)
        self._check_goes_with("max_new_tokens", GENERATED)
        self._check_goes_with("num_few_shot", ("gsm8k", "math", "mmlu"))
        self._check_goes_with("window", ("loss", "drift"))
        self._check_goes_with("stride", ("loss", "drift"))
        self._check_goes_with("seed", ("mt_bench", "drift"))
        self._check_of_samples()
        self._check_judge()
        if self.backend == "vllm" and self.task not in GENERATED:
            raise ValueError(f"--backend vllm only generates ({', '.join(GENERATED)}); {self.task} needs transformers")
        if self.task == "humaneval" and not self.allow_code_execution:
            raise ValueError(
                "--task humaneval runs programs that the model wrote, in a sandbox without network or access to your "
                "files. Nothing is run unless you agree to that: add --allow_code_execution"
            )

    @property
    def new_tokens(self) -> int:
        """The most tokens that an answer may have, for the tasks that generate answers."""
        return self.max_new_tokens or NEW_TOKENS[self.task]

    @property
    def style(self) -> Style:
        """How a question is put to the model."""
        return self.prompt or ("chat" if self.task == "mt_bench" else "papers")

    @property
    def shots(self) -> int:
        """Number of few-shot examples."""
        return SHOTS.get(self.task, 0) if self.num_few_shot is None else self.num_few_shot

    def _check_of_samples(self) -> None:
        """Stop at options of the drift's samples without them, and at options of a text where samples are measured."""
        for name in ("samples", "sample_tokens"):
            self._check_goes_with(name, ("drift",))
        for name in ("samples", "sample_tokens", "seed"):
            if self.task == "drift" and getattr(self, name) is not None and self.data is not None:
                raise ValueError(f"--{name} is of the base model's own samples, and --data measures a text instead")
        if self.task == "drift" and self.data is None:
            for name in ("limit", "window", "stride", "columns"):
                if getattr(self, name):
                    raise ValueError(
                        f"--{name} is of a text, which --data names; the base model's own samples have --samples, "
                        f"--sample_tokens and --seed"
                    )

    def _check_judge(self) -> None:
        for name in ("judge_url", "judge_model", "judge_temperature"):
            self._check_goes_with(name, ("mt_bench",))
        if (self.judge_url is None) != (self.judge_model is None):
            there, absent = ("url", "model") if self.judge_model is None else ("model", "url")
            raise ValueError(f"--judge_{there} needs --judge_{absent}: the model that judges, and where it is asked")
        if self.judge_temperature is not None:
            if self.judge_url is None:
                raise ValueError("--judge_temperature needs a judge: --judge_url and --judge_model")
            if not 0 <= self.judge_temperature <= 2:
                raise ValueError(f"--judge_temperature is {self.judge_temperature}: a number from 0 to 2 is needed")

    def _check_goes_with(self, name: str, tasks: tuple[str, ...]) -> None:
        if getattr(self, name) is not None and self.task not in tasks:
            raise ValueError(f"--{name} goes with --task {' or '.join(tasks)}, not with {self.task}")


def parse(argv: Sequence[str]) -> Options:
    """Read the command line. `--help`, and what argparse refuses, end the process.

    Raises:
        ValueError: the options do not go together.
    """
    parser = OptionParser(
        "evaluate.py", description=DESCRIPTION, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )  # what is not given has the default of `Options`
    add, default = parser.add_argument, {field.name: field.default for field in fields(Options)}
    add("--task", required=True, choices=get_args(TaskName), help="what to measure")
    add_model_options(parser, base="; drift: what a model was trained from")
    add(
        "--data",
        help="folder, file or hub name (default: the task's own on the hub; loss: a run's held-out data; drift: what "
        "the base model writes by itself)",
    )
    add(
        "--columns", nargs="+", type=_pair, metavar="NAME=COLUMN",
        help="columns of the data that have other names than the task's, as in question=prompt (loss: as data.columns)",
    )  # fmt: skip
    add("--limit", type=int, help="only so many samples: the first, or of mmlu and math as many per subject")
    add("--num_few_shot", type=int, help=f"examples before the question (default: {_per_task(SHOTS)}, else 0)")
    add("--batch_size", type=int, help=f"samples at once on each rank (default: {default['batch_size']})")
    add("--max_new_tokens", type=int, help=f"most tokens of an answer (default: {_per_task(NEW_TOKENS)})")
    add(
        "--prompt", choices=get_args(Style),
        help="papers: the layout of training; chat: the tokenizer's chat template; plain: for a base model (default: "
        "papers; mt_bench: chat)",
    )  # fmt: skip
    add("--window", type=int, help=f"loss, drift: of --data, tokens at once (default: {WINDOW}, or what it takes)")
    add("--stride", type=int, help="loss, drift: of --data, tokens from window to window (default: half a window)")
    add("--samples", type=int, help=f"drift: how many texts the base model writes (default: {SAMPLES})")
    add(
        "--sample_tokens", type=int, help=f"drift: the most tokens of each (default: {SAMPLE_TOKENS}, or what it takes)"
    )
    add("--seed", type=int, help="drift: seed of the base model's texts; mt_bench: seed of the answers (default: 0)")
    add("--output", type=Path, help="folder of the results (default: RUN/evaluation/TASK or evaluations/MODEL-TASK)")
    add("--backend", choices=get_args(Backend), help=f"what generates (default: {default['backend']})")
    _add_judge(parser)
    add("--allow_code_execution", action="store_true", help="humaneval: run the model's programs, in a sandbox")
    add("--local_rank", type=int, help="added by DeepSpeed's launcher; ignored")
    given = vars(parser.parse_args(argv))
    given.pop("local_rank", None)
    given["columns"] = dict(given.get("columns", ()))
    return Options(**given)


def _add_judge(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model that rates the answers of mt_bench."""
    add = parser.add_argument
    add("--judge_url", help="mt_bench: OpenAI-compatible service of the judge, such as https://api.openai.com/v1")
    add("--judge_model", help="mt_bench: the judge's name there; its key is read from the environment: JUDGE_API_KEY")
    add("--judge_temperature", type=float, help="mt_bench: that the judge answers with (default: 0)")


def _pair(text: str) -> tuple[str, str]:
    name, sign, column = text.partition("=")
    if not (name and sign and column):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN")
    return name, column


def _per_task(numbers: Mapping[str, int]) -> str:
    """The numbers in words, as in `gsm8k 1024, math and humaneval 2048`."""
    tasks = {number: [task for task in numbers if numbers[task] == number] for number in numbers.values()}
    return ", ".join(f"{' and '.join(names)} {number}" for number, names in tasks.items())
