"""The sides of a comparison of training steps. `step_of` gives, by a side's name, a function that takes one step.

sorsa                        SORSA in this trainer's engine
nf4, nf4_double, int8        SORSA over a quantised residual, in this trainer's engine
lora, pissa                  PEFT's layers in this trainer's engine
trainer_lora, trainer_pissa  PEFT's models in the HF Trainer, as users run it
qlora, qlora_double          PEFT's LoRA over bitsandbytes' 4-bit linears, in a plain loop
reference                    the authors' layer and `calc_ortho`, in a plain loop
frozen                       forward and backward of the model without adapters, the least that any side must do

A plain loop has no engine around it, and so spends none of an engine's own time.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.helpers.common import autocast_to
from benchmarks.helpers.hf_trainer import TrainerSteps
from benchmarks.helpers.models import RATE, batch_of, default_model, engine_of, shaped_model
from benchmarks.helpers.peers import as_reference, reference_layers
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.runtime.device import this_device
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.train.loss import summed_loss

Step = Callable[[], object]

QUANTISED = ("nf4", "nf4_double", "int8")
OURS = ("sorsa", *QUANTISED)
ENGINES = (*OURS, "lora", "pissa")
"""Sides in this trainer's engine: only these run with ZeRO and with activation checkpointing."""

COEFFICIENT = 0.2
"""gamma / eta_d of the authors' step."""
PISSA = "pissa_niter_4"


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a step is, and how many are timed."""
    parser.add_argument("--shape", type=shape, help="folder with a config.json (default: the default model)")
    parser.add_argument("--rank", type=at_least_one, default=16)
    parser.add_argument("--batch", type=at_least_one, default=2, help="sequences per step and rank")
    parser.add_argument("--length", type=at_least_one, default=128, help="tokens per sequence")
    parser.add_argument("--precision", choices=("fp32", "mixed"), default="fp32")
    parser.add_argument("--rounds", type=at_least_one, default=7, help="steps of each side that are timed")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which engine takes the step."""
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="ZeRO stage")
    parser.add_argument("--zero", type=json.loads, help="settings of zero_optimization over the shipped ones, as JSON")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")


def shape(text: str) -> Path:
    """The value of an option that names a folder with a config.json."""
    if not Path(text, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"there is no config.json in {text}")
    return Path(text)


def at_least_one(text: str) -> int:
    """The value of an option that is a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def given_sizes(a: argparse.Namespace) -> list[str]:
    """The options of `add_sizes` with their values, for a worker's command line."""
    words = [] if a.shape is None else ["--shape", str(a.shape)]
    names = ("rank", "batch", "length", "precision", "rounds")
    return [*words, *(word for name in names for word in (f"--{name}", str(getattr(a, name))))]


def step_of(name: str, a: argparse.Namespace) -> Step:
    """A function that takes one step of a side. a: the options of `add_sizes` and of `add_engine`."""
    if name in ENGINES:
        return engine_step(name, a)[1]
    return {
        "trainer_lora": lambda a: hf_trainer(a, True), "trainer_pissa": lambda a: hf_trainer(a, PISSA),
        "qlora": qlora, "qlora_double": lambda a: qlora(a, double=True), "reference": reference, "frozen": frozen,
    }[name](a)  # fmt: skip


def engine_step(name: str, a: argparse.Namespace) -> tuple[SorsaEngine, Step]:
    """The engine of one of ENGINES, around a model of its own, and a function that takes one step of it."""
    model = made("sorsa" if name in OURS else name, a, name if name in QUANTISED else "auto")
    batch, learned = examples(model, a)
    engine = engine_of(model, a.stage, a.precision, name in OURS, a.checkpointing, a.zero)
    return engine, lambda: engine.train_step(summed_loss(engine, batch) / learned for _ in range(1))


def made(method: str, a: argparse.Namespace, storage: str = "auto") -> nn.Module:
    """The model with the layers of a method.

    storage: how the residual is stored, as `residual.storage`.
    """
    if a.shape is not None:
        return shaped_model(a.shape, method, a.rank, a.stage, a.precision, storage)
    return default_model(method, a.rank, a.stage, a.precision, storage).model


def examples(model: nn.Module, a: argparse.Namespace) -> tuple[dict[str, torch.Tensor], int]:
    """The batch that every step takes, and the number of its tokens that are learned."""
    return batch_of(a.length, model.config.vocab_size, this_device(), a.batch), a.batch * (a.length - 1)


def reference(a: argparse.Namespace) -> Step:
    """A step of the authors' layer in the order of their trainer: loss, clip, a backward for `calc_ortho`, AdamW."""
    model = made("sorsa", a)
    for name, module in list(model.named_modules()):
        if isinstance(module, SorsaLinear):
            replace(model, name, as_reference(module))
    calc_ortho = reference_layers().calc_ortho
    return plain_loop(model, a, lambda: (COEFFICIENT * calc_ortho(model)).backward())


def qlora(a: argparse.Namespace, double: bool = False) -> Step:
    """PEFT's LoRA over the default model's 4-bit linears, as transformers loads them.

    double: the scales are quantised too.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if a.precision == "mixed" else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=double
    )
    model = AutoModelForCausalLM.from_pretrained(
        ensure_embedded_model(lambda text: None), dtype=dtype, quantization_config=config,
        device_map={"": this_device()},
    )  # fmt: skip
    return plain_loop(get_peft_model(model, lora_config(a)).train(), a, lambda: None)


def plain_loop(model: nn.Module, a: argparse.Namespace, before_update: Callable[[], None]) -> Step:
    """Loss, backward, clip and fused AdamW, as in a training loop that a user writes.

    before_update: called between the clip and AdamW.
    """
    batch, learned = examples(model, a)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        with cast(a):
            loss = summed_loss(model, batch) / learned
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        before_update()
        optimizer.step()
        optimizer.zero_grad()

    return step


def frozen(a: argparse.Namespace) -> Step:
    """Forward and backward, down to the embeddings, of the model without adapters."""
    model = bare(a).requires_grad_(False)
    batch, learned = examples(model, a)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def step() -> None:
        with cast(a):
            loss = summed_loss(model, batch) / learned
        loss.backward()

    return step


def hf_trainer(a: argparse.Namespace, start: bool | str) -> TrainerSteps:
    """PEFT's LoRA in the HF Trainer. start: the value of `LoraConfig.init_lora_weights`."""
    model = bare(a)
    batch, _ = examples(model, a)
    return TrainerSteps(get_peft_model(model, lora_config(a, start)), batch["input_ids"].cpu(), a.precision == "mixed")


def lora_config(a: argparse.Namespace, start: bool | str = True) -> LoraConfig:
    """LoRA of all linears but the output head, at the rank that SORSA has."""
    return LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules="all-linear", init_lora_weights=start)


def bare(a: argparse.Namespace) -> nn.Module:
    """The model without adapters; its frozen weights have the dtype that they have beside an adapter."""
    model = made("lora", a)
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            replace(model, name, module.base_layer)
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def cast(a: argparse.Namespace) -> AbstractContextManager:
    """Autocast to bf16 where the precision is mixed."""
    return autocast_to(torch.bfloat16 if a.precision == "mixed" else torch.float32, this_device())
