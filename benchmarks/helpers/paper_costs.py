"""What the parts of a comparison will cost on some hardware: memory, hours, GPU-hours and disk, before anything runs.

Training is planned by the planner's own functions (`sorsa_ds.plan`). Evaluations that generate are estimated by
`Decoding`, whose assumptions were not measured; `ASSUMPTIONS` says them for the reader of the table.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.helpers.paper_parts import Part
from sorsa_ds.config import deepspeed_json
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.evaluate.options import SAMPLE_TOKENS, SAMPLES, Options
from sorsa_ds.model.skeleton import read_config, skeleton
from sorsa_ds.plan.configuration import configuration_of
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.micro_batch import NoEstimateError
from sorsa_ds.plan.report import Plan, plan
from sorsa_ds.runtime.memory import GIB
from sorsa_ds.study.compare.request import Request
from sorsa_ds.study.compare.trials import Trial

QUESTIONS = {"gsm8k": 1319, "math": 5000}
"""Questions of the published test sets."""

BLOCK_SECONDS = 0.75e-3
"""Seconds that the host needs to launch the kernels of one block for one token: some 50 of about 15 microseconds."""

ANSWER_SHARE = 0.5
"""The longest answer of a batch, as a share of the limit, after training. The base model writes up to the limit."""

PROMPT_TOKENS = 256
"""Tokens of a prompt, whose keys and values lie beside those of the answer."""

KEPT, CHECKPOINT = 16, 12
"""Bytes per trained parameter of a finished run (fp32 factors as they began and ended, and as much for PEFT) at the
most, and of a checkpoint."""

ASSUMPTIONS = f"""\
Training: the planner's seconds per step, at the efficiency that --efficiency assumes, with every example as long as
data.max_length, which is more tokens than there will be.
Generation: a batch goes on until its longest answer ends. The base model writes up to the limit of tokens, a trained
one up to {ANSWER_SHARE:.0%} of the limit. A token of a batch takes the longest of three times: reading the weights in
bf16 with keys and values, multiplying, and launching kernels, {BLOCK_SECONDS * 1e3:g} ms per block. The last one, and
the {ANSWER_SHARE:.0%}, are assumed and not measured, and mostly decide the hours. While launching decides, twice the
--batch_size (in --task_options) halves them.
Left out: start-up, decompositions, prompts, grading, held-out losses. Disk: what a part leaves at the most, and beside
it two checkpoints of 12 bytes per trained parameter while a run is trained; the base model and caches come on top."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The planned cost of a part.

    models: how many are trained or measured. gib: memory of a GPU. fits: whether that is there. disk: GiB that it
    leaves at the most. passing: further GiB of disk while it is made.
    """

    part: str
    models: int
    gib: float
    fits: bool
    hours: float
    gpu_hours: float
    disk: float
    passing: float = 0.0


@dataclass(frozen=True, slots=True)
class Decoding:
    """A model that writes answers greedily, in bf16, one token of a whole batch at a time.

    parameters: the number of the model's parameters.
    blocks: the number of the model's blocks.
    token_bytes: bytes of the keys and values of one token in all blocks.
    """

    parameters: int
    blocks: int
    token_bytes: int

    @classmethod
    def of(cls, settings: RunConfig) -> "Decoding":
        """What the configuration of the settings' model says."""
        folder = configuration_of(settings.model, settings.loading)
        config = read_config(folder, settings.loading).get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        parameters = sum(p.numel() for p in skeleton(folder, settings.loading).parameters())
        return cls(parameters, config.num_hidden_layers, config.num_hidden_layers * 2 * kept * width * 2)

    def bytes(self, batch: int, tokens: int) -> int:
        """Bytes of the weights, and of keys and values for a batch of so many tokens each."""
        return 2 * self.parameters + batch * tokens * self.token_bytes

    def seconds(self, questions: int, batch: int, tokens: float, hardware: Hardware) -> float:
        """Seconds of answering questions, where each batch takes so many tokens, on all GPUs together."""
        turns = math.ceil(math.ceil(questions / batch) / hardware.ranks) * tokens
        reading = self.bytes(batch, PROMPT_TOKENS + int(tokens) // 2) / (hardware.memory_bandwidth * 1e9)
        products = 2 * self.parameters * batch / (hardware.tflops * 1e12 * hardware.efficiency)
        return turns * max(reading, products, self.blocks * BLOCK_SECONDS)


def costs(parts: Sequence[Part], request: Request, options: dict[str, Options], hardware: Hardware) -> list[Cost]:
    """The cost of each part.

    Args:
        options: task of a part -> options of launch/evaluate.py.

    Raises:
        ValueError: the model is not found, or it cannot be told how much is trained.
    """
    decoding = Decoding.of(request.base) if options else None
    given = deepspeed_json.read_ds_config(request.ds_config)
    found = []
    for part in parts:
        if part.task is None:
            found.append(_training(part, request, given, hardware))
        else:
            assert decoding is not None, "the part has a task, which has options"
            found.append(_measuring(part, request, options[part.task], decoding, hardware))
    return found


def as_table(found: Sequence[Cost], hardware: Hardware) -> str:
    """The costs as a table in Markdown, with their sum."""
    headings = ["part", "models", "GiB of a GPU", "hours", "GPU-hours", "disk, GiB", "beside it at work"]
    rows = [headings, ["---"] * len(headings)]
    for cost in found:
        memory = f"{cost.gib:.1f}" + ("" if cost.fits else f", does not fit into {hardware.gpu_memory / GIB:.0f}")
        rows.append(
            [cost.part, str(cost.models), memory, *_figures(cost.hours, cost.gpu_hours, cost.disk, cost.passing)]
        )
    sums = (sum(getattr(cost, name) for cost in found) for name in ("hours", "gpu_hours", "disk"))
    largest = max(cost.gib for cost in found)
    rows.append(["all", "", f"{largest:.1f}", *_figures(*sums, max(cost.passing for cost in found))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(hours: float, gpu_hours: float, disk: float, passing: float) -> list[str]:
    return [f"{hours:.2f}", f"{gpu_hours:.2f}", f"{disk:.1f}", f"{passing:.1f}"]


def steps_of(config: RunConfig, batch: int) -> int:
    """Optimizer steps of a run, where the settings alone tell them.

    Raises:
        ValueError: the settings do not say how many rows are learned.
    """
    if config.train.steps is not None:
        return config.train.steps
    sliced = re.search(r"\[(\d*):(\d+)\]$", config.data.train_split)
    if sliced is None:
        raise ValueError(
            f"data.train_split: {config.data.train_split!r} does not say how many rows are learned, so that no cost "
            f"can be planned; write a slice, as train[:100000], or set train.steps"
        )
    rows = int(sliced[2]) - int(sliced[1] or 0)
    return math.ceil(rows * config.train.epochs / batch)


def _training(part: Part, request: Request, given: dict, hardware: Hardware) -> Cost:
    [method] = part.methods
    rates = request.rates[method]
    config = Trial(method, rates[0], request.seeds[0]).config(request.base, request.output)
    planned = _plan(config, given, hardware)
    others = len(request.seeds) - 1
    runs = len(rates) * (1 + others) if request.every_seed else len(rates) + others
    steps = steps_of(config, planned.job.resolved.global_batch_size)
    hours = runs * steps * planned.speed.seconds / 3600
    left, passing = (planned.facts.trainable * size / GIB for size in (KEPT * runs, 2 * CHECKPOINT))
    gib = planned.memory.total / GIB
    return Cost(part.name, runs, gib, planned.fits, hours, hours * hardware.ranks, left, passing)


def _plan(config: RunConfig, given: dict, hardware: Hardware) -> Plan:
    try:
        return plan(configuration_of(config.model, config.loading), Job.of(config, given, hardware))
    except NoEstimateError as error:
        raise ValueError(
            f"model: the memory and time of {config.model} cannot be planned ({error}); leave out --plan, it may train "
            f"all the same"
        ) from error


def _measuring(part: Part, request: Request, options: Options, decoding: Decoding, hardware: Hardware) -> Cost:
    of_every_rate = part.task == "drift"
    rates = sum(len(request.rates[m]) if of_every_rate else 1 for m in part.methods)
    models = 1 + rates * len(request.seeds)
    batch = options.batch_size
    if part.task == "drift":
        # The base model writes its samples once; both models then read them, which takes no time beside that.
        tokens = options.sample_tokens or SAMPLE_TOKENS
        questions = options.samples or SAMPLES
        seconds = decoding.seconds(questions, batch, tokens, hardware)
        size = 2 * decoding.bytes(batch, tokens)
    else:
        tokens = options.new_tokens
        questions = min(options.limit or QUESTIONS[options.task], QUESTIONS[options.task])
        times = [decoding.seconds(questions, batch, share * tokens, hardware) for share in (1, ANSWER_SHARE)]
        seconds = times[0] + (models - 1) * times[1]
        size = decoding.bytes(min(batch, questions), PROMPT_TOKENS + tokens)
    hours = seconds / 3600
    disk = models * questions * tokens * 4 / GIB  # about four characters per token
    fits = size <= hardware.gpu_memory
    return Cost(part.name, models, size / GIB, fits, hours, hours * hardware.ranks, disk)
