"""The quantised residual: bytes held and gathered, error, step time, a training run, and the plan for 70B.

    python benchmarks/quantized.py                everything, on the default model
    python benchmarks/quantized.py --steps 4      a shorter training run
    python benchmarks/quantized.py --shape sorsa_ds/plan/shapes/llama2_70b --storage nf4_double --rank 128 \\
        --lengths 512 2048                        one GPU: a model of that shape with random weights, and nothing else

Both sides of every ratio are run here, each in fresh processes with one thread per rank. Seconds of a step are medians
of steps taken in turns in one process. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.helpers.common import in_ranks, say
from sorsa_ds.config.schema import AdapterConfig, DataConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.runtime.memory import GIB

WORKER = "benchmarks.workers.quantized"
LLAMA_70B = "meta-llama/Llama-2-70b-hf"


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="nf4", choices=("nf4", "nf4_double", "int8"))
    parser.add_argument("--rank", type=int, default=16, help="rank of SORSA, but for the training runs")
    parser.add_argument("--train_rank", type=int, default=64, help="rank of SORSA in the training runs")
    parser.add_argument("--iterations", type=int, default=5, help="residual.iterations of the quantised training run")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="learning rate of the training runs")
    parser.add_argument("--steps", type=int, help="optimizer steps of the training runs (default: one epoch)")
    parser.add_argument("--timed", type=int, default=5, help="steps that are timed")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128], help="tokens per sequence")
    parser.add_argument("--shape", type=Path, help="folder with a config.json: train that shape, and nothing else")
    a = parser.parse_args()
    sizes = ("--rank", str(a.rank), "--lengths", *map(str, a.lengths))
    if a.shape is not None:
        given = ("--storage", a.storage, *sizes, "--steps", str(a.timed), "--shape", str(a.shape))
        result = in_ranks(WORKER, 1, "shaped", *given)
    else:
        result = {
            **held(), **gathered(a.storage, sizes), **timed(a.storage, sizes, a.timed),
            **trained(a.storage, a.iterations, a.train_rank, a.learning_rate, a.steps), **plan(),
        }  # fmt: skip
    for key, value in result.items():
        say(f"{key:32} {value if not isinstance(value, float) else round(value, 4)}")
    print(json.dumps(result))


def held() -> dict:
    """Bytes of the residuals' tensors over those in bf16, the worse of 1 and 2 ranks; errors at the start, mean over
    layers, over those of quantising without SORSA."""
    found = {
        (storage, world): in_ranks(WORKER, world, "bytes", "--storage", storage)
        for storage in ("bf16", "nf4", "nf4_double", "int8")
        for world in (1, 2)
    }
    result = {}
    for storage in ("nf4", "nf4_double", "int8"):
        ratios = [
            max(found[storage, world]["bytes"]) / max(found["bf16", world]["bytes"]) for world in (1, 2)
        ]  # fmt: skip
        result[f"{storage}_bytes_ratio"] = max(ratios)
        errors = found[storage, 1]
        result[f"error_vs_plain_{storage}"] = errors["error"] / errors["plain_error"]
        say(f"{storage}: {sum(errors['bytes']) * 8 / errors['numbers']:.3f} bits per weight; error "
            f"{errors['error']:.4f}, of plain quantisation {errors['plain_error']:.4f}")  # fmt: skip
    return result


def gathered(storage: str, sizes: tuple[str, ...]) -> dict:
    """Bytes that a rank's all-gathers deliver for the residual in one ZeRO-3 step, over those for a bf16 residual.

    Everything that is not in uint8 (embeddings, norms, factors) is the same on both sides.
    """
    ours, theirs = (in_ranks(WORKER, 2, "gather", "--storage", name, *sizes) for name in (storage, "bf16"))
    packed = ours["torch.uint8"]
    dense = sum(theirs.values()) - (sum(ours.values()) - packed)
    say(f"gathered by a rank in a step: {packed / 1e6:.1f} MB packed, {dense / 1e6:.1f} MB bf16")
    return {"gather_bytes_ratio": packed / dense}


def timed(storage: str, sizes: tuple[str, ...], steps: int) -> dict:
    """Seconds of a step with a quantised residual, over those with a bf16 one, and over QLoRA's at the same rank."""
    found = in_ranks(WORKER, 1, "steps", "--storage", storage, *sizes, "--steps", str(steps))
    say("seconds per step: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return {"step_vs_bf16": found[storage] / found["bf16"], "step_vs_qlora": found[storage] / found["qlora"]}


def trained(storage: str, iterations: int, rank: int, rate: float, steps: int | None) -> dict:
    """Losses of the default run on two ranks under ZeRO-2, with a quantised and with a bf16 residual.

    Prints the training losses of every step.
    """
    many = () if steps is None else ("--steps", str(steps))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (
            in_ranks(
                WORKER, 2, "train", "--storage", name, "--iterations", str(rounds), "--rank", str(rank),
                "--learning_rate", str(rate), "--folder", folder, *many,
            )
            for name, rounds in ((storage, iterations), ("bf16", 1))
        )  # fmt: skip
    say(f"step: training loss with {storage} | bf16")
    for step, pair in enumerate(zip(ours["losses"], theirs["losses"], strict=True), start=1):
        say(f"{step:4}: " + " | ".join(f"{loss:.4f}" for loss in pair))
    return {
        "start_loss_ratio": ours["start_loss"] / theirs["start_loss"],
        "eval_loss_ratio": ours["eval_loss_end"] / theirs["eval_loss_end"],
        "eval_loss": ours["eval_loss_end"], "eval_loss_bf16": theirs["eval_loss_end"],
    }  # fmt: skip


def plan() -> dict:
    """GiB that the planner predicts for Llama 2 70B on one GPU: activation checkpointing, one sequence at a time."""
    result = {}
    for storage in ("nf4", "nf4_double"):
        for rank in (64, 128):
            for length in (512, 2048):
                config = RunConfig(
                    model=LLAMA_70B, adapter=AdapterConfig(rank=rank), residual=ResidualConfig(storage=storage),
                    data=DataConfig(max_length=length),
                    train=TrainConfig(precision="mixed", micro_batch_size=1, gradient_checkpointing=True),
                )  # fmt: skip
                job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware())
                needed = memory(job, facts(shipped(LLAMA_70B), job))
                result[f"plan_70b_{storage}_r{rank}_{length}_gib"] = round(needed.total / GIB, 1)
                parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.gpu.items() if size > GIB / 20)
                say(f"70B, {storage}, r = {rank}, {length} tokens: {needed.total / GIB:.1f} GiB ({parts})")
    return result


if __name__ == "__main__":
    main()
