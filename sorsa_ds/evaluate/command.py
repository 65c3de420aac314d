"""The way of an evaluation: find the model, refuse what does not fit, go on where it was, share the work, report."""

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import GenerationConfig

from sorsa_ds.data.chat import end_rendering
from sorsa_ds.data.chat_templates import use_template
from sorsa_ds.data.run_data import load_held_out
from sorsa_ds.evaluate.backends.likelihood import Likelihood
from sorsa_ds.evaluate.backends.vllm import Vllm
from sorsa_ds.evaluate.drift import drift_from_base
from sorsa_ds.evaluate.models import FoundModel, find_evaluated_model
from sorsa_ds.evaluate.options import UNGRADED, Options
from sorsa_ds.evaluate.records import RESULTS, Records
from sorsa_ds.evaluate.sharing import Board
from sorsa_ds.evaluate.tasks import gsm8k, humaneval, loss, math, mmlu, mt_bench
from sorsa_ds.evaluate.tasks.math_answers import RULES
from sorsa_ds.evaluate.tasks.task import Engine, Generate, LocalEngine, Setting, Task
from sorsa_ds.model.generation import end_tokens
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.run.checkpoint.folder import step_of
from sorsa_ds.run.checkpoint.keeper import PACKAGES
from sorsa_ds.run.finished import FinishedRun
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.runtime import collectives, precision
from sorsa_ds.runtime.console import quiet_libraries, say, table
from sorsa_ds.runtime.device import device_type, this_device
from sorsa_ds.runtime.extras import check_extra
from sorsa_ds.runtime.process import start_process
from sorsa_ds.runtime.versions import package_versions
from sorsa_ds.runtime.waiting import first_of_job

BUILD: dict[str, Callable[[Options, Setting], Task]] = {
    "gsm8k": gsm8k.build, "math": math.build, "humaneval": humaneval.build, "mmlu": mmlu.build,
    "mt_bench": mt_bench.build, "loss": loss.build,
}  # fmt: skip
_GRADERS = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy")


@dataclass(frozen=True, slots=True)
class Products:
    """Dtypes of a loaded model's matrix products.

    dtype: the weights' dtype; None: as they were trained. autocast: whether products need torch.autocast. sentence:
    explains them to the user.
    """

    dtype: torch.dtype | None
    autocast: bool
    sentence: str


def evaluate(options: Options) -> dict:
    """Evaluate a model; returns the content of results.json. A collective call.

    Raises:
        ValueError: the model, the data or an option does not fit; nothing has been generated then.
    """
    if options.task in ("gsm8k", "math"):
        check_extra("math_verify", f"--task {options.task}")
    device = _start(options)
    found = find_evaluated_model(
        options.model, options.base, options.trust_remote_code, options.checkpoint, options.task == "drift"
    )
    products = _products(options, found)
    say(products.sentence)
    tokenizer = load_tokenizer(found.tokenizer, found.loading)
    if found.chat_template is not None:
        use_template(tokenizer, str(found.chat_template))
    folder = _folder(options, found)
    setting = Setting(tokenizer, found.tokenizer, found.positions(), options.style == "chat", folder)
    try:
        task = _build(options, found, setting, device, products)
    finally:
        end_rendering()  # all prompts are made by now
    settings = {"model": options.model, "kind": found.kind, "task": options.task, "data": options.data}
    if found.checkpoint is not None:
        settings["checkpoint"] = found.checkpoint.name
    identity = _identity(options, found, task, products.dtype)
    with closing(task):
        records = Records(folder, settings, identity, device)
        for line in task.notes():
            say(line)
        if done := len(records.done):
            say(f"{done} of {len(task.ids)} samples are in {records.folder} already; going on with the others.")
        tokens, seconds = 0, 0.0
        if done < len(task.ids):
            engine = _engine(options, found, setting, device, products)
            began = time.monotonic()  # loading the model does not count
            tokens = _work(task, engine, records, options)
            seconds = time.monotonic() - began
        results = {
            **task.results(records.collect(task.ids)),
            "speed": {
                "samples": len(task.ids) - done, "tokens": tokens, "seconds": seconds,
                "tokens_per_second": tokens / seconds if seconds else 0.0, "ranks": collectives.world_size(),
                "batch_size": options.batch_size,
            },
            "settings": {**settings, **identity},
            "versions": package_versions((*PACKAGES, *_GRADERS, "vllm")),
        }  # fmt: skip
        records.finish(results)
        rows = [*task.rows(results), *_speed_rows(results["speed"]), ("written to", str(records.folder / RESULTS))]
        say(f"\n{options.task}, {options.model}\n{table(rows)}")
    return results


def _start(options: Options) -> torch.device:
    """Start this process for the chosen backend; returns the device on which it computes."""
    if options.backend == "vllm":  # which starts its own processes
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--backend vllm takes all GPUs from one process: start it with python, without launcher")
        quiet_libraries()
    else:
        start_process()
    return this_device() if options.backend == "transformers" else torch.device("cpu")


def _work(task: Task, engine: Engine, records: Records, options: Options) -> int:
    """Do all the work that is left; returns the number of tokens of the samples made now, summed over the ranks."""
    task.start(engine)
    graded = options.task not in UNGRADED
    correct = sum(record["correct"] for record in records.done.values()) if graded else None
    batches = task.batches(records.done, options.batch_size)
    board = Board(len(task.ids), len(records.done), correct, options.task)
    tokens = 0

    def emit(record: dict) -> None:
        nonlocal tokens
        tokens += record["tokens"]
        records.write(record)
        board.add(record["correct"])

    try:
        for batch in board.take(batches):
            task.work(batch, emit)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch_size: the GPU's memory is too small for {options.batch_size}; lower it") from error
    board.close()
    return sum(collectives.gather_lists([tokens]))


def _build(options: Options, found: FoundModel, setting: Setting, device: torch.device, products: Products) -> Task:
    if options.task == "drift":
        return drift_from_base(options, found, setting, device, products.dtype)
    if options.task != "loss" or options.data is not None:
        return BUILD[options.task](options, setting)
    if found.run is None:
        raise ValueError("--task loss needs --data, the text to measure; only a run brings its own (held-out) data")
    folder, config = found.run
    reported = _reported(found, folder)
    data = replace(config.data, chat_template=None)  # the tokenizer has the one that the run has kept
    sources = load_held_out(data, setting.tokenizer, config.train.seed)
    if not sources or (reported is None and found.checkpoint is None):
        raise ValueError(f"--model: {folder} was trained without held-out data (data.eval_size, data.eval_split)")
    held_out = islice(chain.from_iterable(sources.values()), options.limit)
    return loss.held_out(list(held_out), reported, ", ".join(examples.counts.source for examples in sources.values()))


def _reported(found: FoundModel, run: Path) -> float | None:
    """The held-out loss that the run itself has measured of what is evaluated; None where it has not."""
    if found.checkpoint is None:
        return FinishedRun(run).report()["eval_loss_end"]
    step = step_of(found.checkpoint)
    told = [line["eval_loss"] for line in read_metrics(run) if line["step"] == step and "eval_loss" in line]
    return told[-1] if told else None


def _products(options: Options, found: FoundModel) -> Products:
    if options.task == "loss" and options.dtype == "auto" and found.computes is not None:
        name = "bf16" if found.computes == torch.bfloat16 else "fp32"
        return Products(None, found.autocast, f"Products in {name}, as in training.")
    name, why = precision.resolve_inference_dtype(options.dtype, device_type())
    return Products(torch.bfloat16 if name == "bf16" else torch.float32, False, why)


def _engine(options: Options, found: FoundModel, setting: Setting, device: torch.device, products: Products) -> Engine:
    if options.backend == "transformers":
        return LocalEngine(found.load(device, products.dtype), setting, device, products.autocast)
    return _VllmEngine(found, setting, products.dtype)


class _VllmEngine:
    """A model that vLLM has loaded. It generates; it does not give likelihoods."""

    def __init__(self, found: FoundModel, setting: Setting, dtype: torch.dtype | None):
        if found.kind != "model":
            raise ValueError(
                "--backend vllm takes plain models; merge first: launch/export.py --format merged (or PEFT's "
                "merge_and_unload), then evaluate that folder"
            )
        try:
            config = GenerationConfig.from_pretrained(found.tokenizer)
        except OSError:  # the model has no such file
            config = None
        ends = end_tokens(config, setting.tokenizer)
        self._vllm = Vllm(found.tokenizer, dtype, ends, found.loading.trust_remote_code)

    def generator(self) -> Generate:
        return self._vllm

    def likelihood(self) -> Likelihood:
        raise AssertionError("options refuse --backend vllm for tasks that need likelihoods")


def _identity(options: Options, found: FoundModel, task: Task, dtype: torch.dtype | None) -> dict:
    """Everything that a sample depends on, which excludes the number of ranks and the batches."""
    return {
        "task": options.task,
        "weights": first_of_job(found.digest, "hashing the weights"),
        "samples": len(task.ids),
        "questions": task.digest(),
        "judged_by": _judged_by(options.task),
        "prompt": options.style,
        "few_shot": options.shots,
        "products": "as trained" if dtype is None else str(dtype).removeprefix("torch."),
        "backend": options.backend,
    }


def _judged_by(task: str) -> str:
    """Everything except the questions that a judgement depends on."""
    if task == "humaneval":
        return f"Python {platform.python_version()}"
    if task in ("gsm8k", "math"):
        return ", ".join([f"rules {RULES}", *(f"{name} {found}" for name, found in package_versions(_GRADERS).items())])
    return "likelihood"


def _folder(options: Options, found: FoundModel) -> Path:
    if options.output is not None:
        return options.output.expanduser().resolve()
    if found.run is not None:
        name = "held-out-loss" if options.task == "loss" and options.data is None else _name(options)
        of = "" if found.checkpoint is None else f"-{found.checkpoint.name}"
        return found.run[0].resolve() / "evaluation" / f"{name}{of}"
    model = re.sub(r"[^\w.-]", "-", options.model.rstrip("/").rpartition("/")[2])
    return Path("evaluations").resolve() / f"{model}-{_name(options)}"


def _name(options: Options) -> str:
    """The task, in the name of a folder of results: the drift on a text is kept apart from that on samples."""
    return "drift-of-text" if options.task == "drift" and options.data is not None else options.task


def _speed_rows(speed: dict) -> list[tuple[str, str]]:
    if not speed["samples"]:
        return []
    ranks = "1 rank" if speed["ranks"] == 1 else f"{speed['ranks']} ranks"
    return [("speed", f"{speed['tokens_per_second']:.1f} tokens/s, {speed['seconds']:.1f} s on {ranks}")]
