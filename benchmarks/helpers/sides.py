"""The sides that a step is compared between: a function that takes one step, by name.

sorsa                        the method in this trainer's engine
nf4, nf4_double, int8        the same over a quantised residual
lora, pissa                  PEFT's layers in this trainer's engine
trainer_lora, trainer_pissa  PEFT's models in the HF Trainer, as users run it
qlora, qlora_double          PEFT's LoRA over bitsandbytes' 4-bit linears, in a plain loop
reference                    the authors' layer and `calc_ortho`, in a plain loop
frozen                       forward and backward of the bare model, to its embeddings: the floor

What is in a plain loop has no engine around it, and so none of an engine's own time.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.helpers.hf_trainer import TrainerSteps
from benchmarks.helpers.models import RATE, batch_of, default_model, engine_of, shaped_model
from benchmarks.helpers.peers import as_reference, reference_layers
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.runtime.process import this_device
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.train.loss import summed_loss

Step = Callable[[], object]

QUANTISED = ("nf4", "nf4_double", "int8")
OURS = ("sorsa", *QUANTISED)
ENGINES = (*OURS, "lora", "pissa")
"""Sides in this trainer's engine; the others know no ZeRO and no checkpointing here."""

COEFFICIENT = 0.2
PISSA = "pissa_niter_4"


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what a step is."""
    parser.add_argument("--shape", type=shape, help="folder with a config.json (default: the default model)")
    parser.add_argument("--rank", type=at_least_one, default=16)
    parser.add_argument("--batch", type=at_least_one, default=2, help="sequences of a step and rank")
    parser.add_argument("--length", type=at_least_one, default=128, help="tokens of a sequence")
    parser.add_argument("--precision", choices=("fp32", "mixed"), default="fp32")


def shape(text: str) -> Path:
    """An argument that names a folder with a config.json."""
    if not Path(text, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"there is no config.json in {text}")
    return Path(text)


def at_least_one(text: str) -> int:
    """An argument that is a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def given_sizes(a: argparse.Namespace) -> list[str]:
    """The same for a worker."""
    words = [] if a.shape is None else ["--shape", str(a.shape)]
    names = ("rank", "batch", "length", "precision")
    return [*words, *(word for name in names for word in (f"--{name}", str(getattr(a, name))))]


def step_of(name: str, a: argparse.Namespace) -> Step:
    """A function that takes one step of that side. a: what `add_sizes` says, `stage`, `checkpointing`, `zero`."""
    if name in ENGINES:
        model = made("sorsa" if name in OURS else name, a, name if name in QUANTISED else "auto")
        batch, learned = examples(model, a)
        engine = engine_of(model, a.stage, a.precision, name in OURS, a.checkpointing, a.zero)
        return lambda: engine.train_step([summed_loss(engine, batch) / learned])
    return {
        "trainer_lora": lambda a: hf_trainer(a, True), "trainer_pissa": lambda a: hf_trainer(a, PISSA),
        "qlora": qlora, "qlora_double": lambda a: qlora(a, double=True), "reference": reference, "frozen": frozen,
    }[name](a)  # fmt: skip


def made(method: str, a: argparse.Namespace, storage: str = "auto") -> nn.Module:
    """The model of a method."""
    if a.shape is not None:
        return shaped_model(a.shape, method, a.rank, a.stage, a.precision, storage)
    return default_model(method, a.rank, a.stage, a.precision, storage).model


def examples(model: nn.Module, a: argparse.Namespace) -> tuple[dict[str, torch.Tensor], int]:
    """The batch of every step, and how many of its tokens are learned."""
    return batch_of(a.length, model.config.vocab_size, this_device(), a.batch), a.batch * (a.length - 1)


def reference(a: argparse.Namespace) -> Step:
    """The authors' layer in a step in their order: loss, clip, a second backward for `calc_ortho`, AdamW."""
    model = made("sorsa", a)
    for name, module in list(model.named_modules()):
        if isinstance(module, SorsaLinear):
            replace(model, name, as_reference(module))
    calc_ortho = reference_layers().calc_ortho
    return plain_loop(model, a, lambda: (COEFFICIENT * calc_ortho(model)).backward())


def qlora(a: argparse.Namespace, double: bool = False) -> Step:
    """PEFT's LoRA over 4-bit linears as transformers loads them; of the default model. double: scales are quantised."""
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
    """Loss, backward, clip, fused AdamW, as a loop of one's own has them."""
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
    """The bare model: forward, and backward down to its embeddings."""
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
    """PEFT's adapters in the HF Trainer. start: `LoraConfig.init_lora_weights`."""
    model = bare(a)
    batch, _ = examples(model, a)
    return TrainerSteps(get_peft_model(model, lora_config(a, start)), batch["input_ids"].cpu(), a.precision == "mixed")


def lora_config(a: argparse.Namespace, start: bool | str = True) -> LoraConfig:
    """All linears but the head, at the rank of ours."""
    return LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules="all-linear", init_lora_weights=start)


def bare(a: argparse.Namespace) -> nn.Module:
    """The model without adapters, its frozen weights in the dtype that ours have."""
    model = made("lora", a)
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            replace(model, name, module.base_layer)
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def cast(a: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Autocast to bf16 where the precision is mixed."""
    mixed = a.precision == "mixed"
    return torch.autocast(this_device().type, torch.bfloat16) if mixed else contextlib.nullcontext()
