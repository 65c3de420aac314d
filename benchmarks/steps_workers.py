"""The sides that benchmarks/steps.py compares; rank 0 prints one JSON object last."""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Peak, run_side
from models import RATE, batch_of, default_model, engine_of, peak_gib, shaped_model
from peers import as_reference, reference_layers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from turns import Turns, synchronise

from sorsa_ds import comm
from sorsa_ds.layer import SorsaLinear
from sorsa_ds.objective import summed_loss
from sorsa_ds.process import this_device

OURS = ("sorsa", "lora", "pissa", "nf4")
COEFFICIENT = 0.2


def main() -> None:
    """Run the worker that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("turns", "memory"))
    parser.add_argument("--sides", nargs="+", required=True)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    add_sizes(parser)
    arguments = parser.parse_args()
    run_side({"turns": turns, "memory": memory}[arguments.what], arguments)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what a step is, and how often it is taken."""
    parser.add_argument("--shape", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--rounds", type=int, required=True)


def turns(a: argparse.Namespace) -> dict:
    """Seconds of each side's step, a list a side; flops of a step of ours, as counted, on this rank."""
    sides = {name: step_of(name, a) for name in a.sides if name != "trainer"}
    counted = {}
    for name in (name for name in OURS if name in sides):
        with FlopCounterMode(display=False) as counter:
            sides[name]()
        counted[name] = counter.get_total_flops()
    others = Turns(sides)
    if "trainer" in a.sides:
        seconds = beside_trainer(a, others)
    else:
        for _ in range(a.rounds):
            others.take()
        seconds = others.seconds
    return {"seconds": seconds, "flops": counted, "tokens": a.batch * a.length * comm.world_size()}


def memory(a: argparse.Namespace) -> dict:
    """Peak of a process that makes the side and takes two steps: of the GPU, or resident."""
    (name,) = a.sides
    with Peak() as peak:
        if name == "trainer":
            trainer(a, 2, []).train()
        else:
            step = step_of(name, a)
            step()
            step()
    return {"gib": peak_gib() or peak.gib}


def step_of(name: str, a: argparse.Namespace) -> Callable[[], object]:
    """A function that takes one step of that side."""
    device = this_device()
    sorsa = name in ("sorsa", "nf4", "reference")
    method = "sorsa" if sorsa else "lora" if name == "frozen" else name
    model = made(method, a, "nf4" if name == "nf4" else "auto")
    batch = batch_of(a.length, model.config.vocab_size, device, a.batch)
    learned = a.batch * (a.length - 1)
    if name in OURS:
        engine = engine_of(model, a.stage, a.precision, sorsa, a.checkpointing)
        return lambda: engine.train_step([summed_loss(engine, batch) / learned])
    return (reference if name == "reference" else frozen)(model, batch, learned, a)


def made(method: str, a: argparse.Namespace, storage: str = "auto") -> nn.Module:
    """The model of a method."""
    if a.shape is not None:
        return shaped_model(a.shape, method, a.rank, a.precision, storage)
    return default_model(method, a.rank, a.stage, a.precision, storage).model


def cast(a: argparse.Namespace):
    """Autocast to bf16 where the precision is mixed."""
    mixed = a.precision == "mixed"
    return torch.autocast(this_device().type, torch.bfloat16) if mixed else contextlib.nullcontext()


def reference(model: nn.Module, batch: dict, learned: int, a: argparse.Namespace) -> Callable[[], None]:
    """The authors' layer in a step in their order: loss, clip, a second backward for `calc_ortho`, AdamW."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SorsaLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, as_reference(module))
    calc_ortho = reference_layers().calc_ortho
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        with cast(a):
            loss = summed_loss(model, batch) / learned
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        (COEFFICIENT * calc_ortho(model)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def frozen(model: nn.Module, batch: dict, learned: int, a: argparse.Namespace) -> Callable[[], None]:
    """The bare model: forward, and backward down to its embeddings."""
    bare(model).requires_grad_(False)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def step() -> None:
        with cast(a):
            loss = summed_loss(model, batch) / learned
        loss.backward()

    return step


def bare(model: nn.Module) -> nn.Module:
    """The model with the frozen linears of PEFT's LoRA layers in their places: what was loaded from disk."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)
    return model


class Beside(TrainerCallback):
    """Times the HF Trainer's steps, and lets the other sides take theirs before each."""

    def __init__(self, others: Turns | None):
        self._others, self.seconds = others, []

    def on_step_begin(self, *_, **__):
        """The others first."""
        if self._others is not None:
            self._others.take()
        synchronise()
        self._began = time.perf_counter()

    def on_step_end(self, *_, **__):
        """After the optimizer's and the scheduler's step."""
        synchronise()
        self.seconds.append(time.perf_counter() - self._began)


def trainer(a: argparse.Namespace, steps: int, callbacks: list[TrainerCallback]) -> Trainer:
    """PEFT's LoRA in the HF Trainer."""
    device = this_device()
    model = get_peft_model(bare(made("lora", a)), LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules="all-linear"))
    rows = batch_of(a.length, model.config.vocab_size, device, a.batch)["input_ids"].cpu()
    data = [{"input_ids": row, "labels": row} for row in rows] * steps
    arguments = TrainingArguments(
        output_dir="unused", per_device_train_batch_size=a.batch, max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="cosine", bf16=a.precision == "mixed", report_to="none", save_strategy="no",
        optim="adamw_torch_fused", use_cpu=device.type == "cpu", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def beside_trainer(a: argparse.Namespace, others: Turns) -> dict[str, list[float]]:
    """The other sides in turns with the HF Trainer, which drives them."""
    beside = Beside(others)
    trainer(a, a.rounds, [beside]).train()
    return {**others.seconds, "trainer": beside.seconds}


if __name__ == "__main__":
    main()
