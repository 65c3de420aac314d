"""The sides that benchmarks/quantized.py compares, each in fresh processes; rank 0 prints one JSON object last."""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from common import run_side
from models import RATE, batch_of, default_model, engine_of, peak_gib, shaped_model
from turns import Turns, synchronise

from sorsa_ds import cli, comm
from sorsa_ds.assemble import assemble
from sorsa_ds.embedded import ensure_embedded_model
from sorsa_ds.objective import summed_loss
from sorsa_ds.process import this_device
from sorsa_ds.run_folder import read_metrics


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
    """Bytes of the residuals' blocks on every rank under ZeRO-3, and the loss of quantising."""
    loaded = default_model("sorsa", a.rank, 3, storage=a.storage)
    held = sum(p.ds_tensor.nbytes for name, p in loaded.model.named_parameters() if ".residual" in name)
    losses = [report.loss for report in loaded.reports if report.loss]
    numbers = sum(target.out_features * target.in_features for target in loaded.targets)
    return {
        "bytes": comm.gather_lists([held]), "numbers": numbers,
        "error": statistics.fmean(x.error for x in losses) if losses else None,
        "plain_error": statistics.fmean(x.plain_error for x in losses) if losses else None,
    }  # fmt: skip


def gathered_bytes(a: argparse.Namespace) -> dict:
    """Bytes by dtype that this rank's all-gathers deliver in one step under ZeRO-3."""
    counted: Counter = Counter()
    gather = torch.distributed.all_gather_into_tensor

    def counting(output_tensor, input_tensor, **options):
        counted[str(output_tensor.dtype)] += output_tensor.nbytes
        return gather(output_tensor, input_tensor, **options)

    loaded = default_model("sorsa", a.rank, 3, storage=a.storage)
    engine = engine_of(loaded.model, 3)
    batch = batch_of(a.lengths[0], loaded.model.config.vocab_size, engine.device)
    from deepspeed import comm as ds_comm

    backend = ds_comm.comm.cdb
    assert backend.all_gather_function is gather, "DeepSpeed gathers with another function"
    backend.all_gather_function = counting
    engine.train_step([summed_loss(engine, batch) / a.lengths[0]])
    backend.all_gather_function = gather
    assert counted, "nothing was gathered"
    return counted


def step_seconds(a: argparse.Namespace) -> dict:
    """Median seconds of a step of one sequence, the sides in turns in one process: bf16, quantised, PEFT's QLoRA."""
    engines = {
        storage: engine_of(default_model("sorsa", a.rank, 0, storage=storage).model, 0)
        for storage in ("bf16", a.storage)
    }
    device = this_device()
    sides = {}
    for storage, engine in engines.items():
        sides[storage] = lambda batch, engine=engine: engine.train_step([summed_loss(engine, batch) / a.lengths[0]])
    sides["qlora"] = qlora_step(a, device)
    batch = batch_of(a.lengths[0], 1000, device)
    turns = Turns({name: lambda side=side: side(batch) for name, side in sides.items()})
    for _ in range(a.steps):
        turns.take()
    return {name: statistics.median(values) for name, values in turns.seconds.items()}


def train(a: argparse.Namespace) -> dict:
    """A training run of the default model and data with that residual: its losses and its report."""
    settings = [
        f"--ds_config={Path(__file__).parents[1] / 'ds_configs/zero2.json'}", f"output.folder={a.folder}",
        f"output.name={a.storage}", "output.save_every=0", f"sorsa.rank={a.rank}", "train.precision=mixed",
        f"train.learning_rate={a.learning_rate}",
        f"residual.storage={a.storage}", f"residual.iterations={a.iterations}",
        *([] if a.steps is None else [f"train.steps={a.steps}"]),
    ]  # fmt: skip
    report = assemble(cli.parse(settings)).train()
    losses = [line["loss"] for line in read_metrics(a.folder / a.storage) if "loss" in line] if comm.rank() == 0 else []
    return {"losses": losses, **{key: report[key] for key in ("start_loss", "base_loss", "eval_loss_end")}}


def qlora_step(a: argparse.Namespace, device: torch.device):
    """A training step of PEFT's LoRA over bitsandbytes' 4-bit linears, in bf16 autocast as ours."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=a.storage == "nf4_double",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        ensure_embedded_model(lambda text: None), dtype=torch.bfloat16, quantization_config=quantisation,
        device_map={"": device},
    )  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules="all-linear")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def step(batch: dict) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = summed_loss(model, batch) / a.lengths[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def shaped(a: argparse.Namespace) -> dict:
    """A model of a shape with made-up weights: initialised, quantised, trained a few steps; its peak memory."""
    began = time.perf_counter()
    model = shaped_model(a.shape, "sorsa", a.rank, storage=a.storage)
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
            engine.train_step([summed_loss(engine, batch) / length])
            synchronise()
            seconds.append(time.perf_counter() - began)
        result |= {f"peak_gib_{length}": peak_gib(), f"seconds_{length}": statistics.median(seconds[1:] or seconds)}
    return result


SIDES = {"bytes": live_bytes, "gather": gathered_bytes, "steps": step_seconds, "shaped": shaped, "train": train}


if __name__ == "__main__":
    main()
