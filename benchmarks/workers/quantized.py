"""The sides that benchmarks/quantized.py compares, each in fresh processes.

Rank 0 prints one JSON object last.
"""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.helpers.common import DS_CONFIGS, run_side
from benchmarks.helpers.models import NOTHING_KEPT, batch_of, default_model, engine_of, peak_gib, shaped_model
from benchmarks.helpers.sides import step_of
from benchmarks.helpers.turns import in_turns, synchronise
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.device import this_device
from sorsa_ds.train.loss import summed_loss
from sorsa_ds.train.options import parse
from sorsa_ds.train.setup import assemble


def main() -> None:
    """Run the side that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(SIDES))
    parser.add_argument("--storage", default="nf4")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--shape", type=Path, help="folder with a config.json")
    parser.add_argument("--folder", type=Path, help="for the runs")
    arguments = parser.parse_args()
    run_side(SIDES[arguments.what], arguments)


def live_bytes(a: argparse.Namespace) -> dict:
    """Bytes of the residuals' shards on every rank under ZeRO-3, and the errors that quantising makes."""
    loaded = default_model("sorsa", a.rank, 3, storage=a.storage)
    held = sum(p.ds_tensor.nbytes for name, p in loaded.model.named_parameters() if ".residual" in name)
    losses = [report.loss for report in loaded.reports if report.loss]
    numbers = sum(target.out_features * target.in_features for target in loaded.targets)
    return {
        "bytes": collectives.gather_lists([held]), "numbers": numbers,
        "error": statistics.fmean(x.error for x in losses) if losses else None,
        "plain_error": statistics.fmean(x.plain_error for x in losses) if losses else None,
    }  # fmt: skip


def gathered_bytes(a: argparse.Namespace) -> dict:
    """Bytes that this rank's all-gathers deliver in one step under ZeRO-3, by dtype."""
    counted: Counter = Counter()
    gather = torch.distributed.all_gather_into_tensor

    def counting(output_tensor, input_tensor, **options):
        counted[str(output_tensor.dtype)] += output_tensor.nbytes
        return gather(output_tensor, input_tensor, **options)

    loaded = default_model("sorsa", a.rank, 3, storage=a.storage)
    engine = engine_of(loaded.model, 3, zero=NOTHING_KEPT)  # all parameters alike: the shipped settings keep small ones
    batch = batch_of(a.lengths[0], loaded.model.config.vocab_size, engine.device)
    from deepspeed import comm as ds_comm

    backend = ds_comm.comm.cdb
    assert backend.all_gather_function is gather, "DeepSpeed gathers with another function"
    backend.all_gather_function = counting
    engine.train_step(summed_loss(engine, batch) / a.lengths[0] for _ in range(1))
    backend.all_gather_function = gather
    assert counted, "nothing was gathered"
    return counted


def step_seconds(a: argparse.Namespace) -> dict:
    """Median seconds of a step of one sequence: over bf16, quantised, and PEFT's QLoRA, in turns in one process."""
    step = argparse.Namespace(
        shape=None, rank=a.rank, batch=1, length=a.lengths[0], precision="mixed", stage=0, checkpointing=False,
        zero=None,
    )  # fmt: skip
    named = {"bf16": "sorsa", a.storage: a.storage, "qlora": "qlora_double" if a.storage == "nf4_double" else "qlora"}
    seconds = in_turns({name: step_of(side, step) for name, side in named.items()}, a.steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train(a: argparse.Namespace) -> dict:
    """Train the default model on the default data with a residual storage; returns losses and parts of the report."""
    settings = [
        f"--ds_config={DS_CONFIGS / 'zero2.json'}", f"output.folder={a.folder}",
        f"output.name={a.storage}", "output.save_every=0", f"adapter.rank={a.rank}", "train.precision=mixed",
        f"train.learning_rate={a.learning_rate}",
        f"residual.storage={a.storage}", f"residual.iterations={a.iterations}",
        *([] if a.steps is None else [f"train.steps={a.steps}"]),
    ]  # fmt: skip
    report = assemble(parse(settings)).train()
    losses = (
        [line["loss"] for line in read_metrics(a.folder / a.storage) if "loss" in line]
        if collectives.rank() == 0
        else []
    )
    return {"losses": losses, **{key: report[key] for key in ("start_loss", "base_loss", "eval_loss_end")}}


def shaped(a: argparse.Namespace) -> dict:
    """Initialise and quantise a model of a shape with random weights, and train it a few steps."""
    began = time.perf_counter()
    model = shaped_model(a.shape, "sorsa", a.rank, 0, storage=a.storage)
    synchronise()
    result: dict = {"initialisation_seconds": time.perf_counter() - began, "initialisation_gib": peak_gib()}
    result["frozen_gib"] = sum(p.nbytes for p in model.parameters() if not p.requires_grad) / 2**30
    result["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device, engine = this_device(), engine_of(model, 0, checkpointing=True)
    for length in a.lengths:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batch, seconds = batch_of(length, model.config.vocab_size, device), []
        for _ in range(a.steps):
            began = time.perf_counter()
            engine.train_step(summed_loss(engine, batch) / length for _ in range(1))
            synchronise()
            seconds.append(time.perf_counter() - began)
        result |= {f"peak_gib_{length}": peak_gib(), f"seconds_{length}": statistics.median(seconds[1:] or seconds)}
    return result


SIDES = {"bytes": live_bytes, "gather": gathered_bytes, "steps": step_seconds, "shaped": shaped, "train": train}


if __name__ == "__main__":
    main()
