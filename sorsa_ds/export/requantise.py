"""The merged model in 4 or 8 bits, as transformers and bitsandbytes load it: quantised anew, and the error stated.

What training packed was the residual alone. A plain linear has no factors beside it, so the merged weight is quantised
as a whole, as QLoRA's would be, and loses some of what SORSA's layers had kept: the errors tell how much.
"""

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.export.merged import MergedPlan, companions
from sorsa_ds.export.options import Quantised
from sorsa_ds.model.language_part import model_class
from sorsa_ds.model.model_files import CONFIG
from sorsa_ds.model.pretrained import PretrainedWeights
from sorsa_ds.model.skeleton import attention_of, skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tensor_file import nbytes
from sorsa_ds.run.source import Source, TensorProgress
from sorsa_ds.runtime.files import write_atomic, write_json

ERRORS = "quantisation.json"
_CPU = (
    "On a CPU with AVX512-BF16, bitsandbytes multiplies only with linears whose out-features are a multiple of 32 "
    "(seen in 0.50.2)."
)
LIMITS: dict[Quantised, str] = {
    "nf4": _CPU, "nf4_double": _CPU, "int8": "LLM.int8 rounds the inputs of these linears as well.",
}  # fmt: skip
"""What to know of each form, besides the error of its weights."""


def linears_of(source: Source, model: PreTrainedModel) -> dict[str, Target]:
    """The linears of a plain model that are quantised: those whose weight training changed, the output head left out.

    bitsandbytes quantises linears alone, and no experts that are held in one parameter.

    Raises:
        ValueError: training changed none.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    trained = source.method.trained_linears(model, source.described.adapter)
    if not (found := {target.name: target for target in trained if target.name in linears}):
        raise ValueError(
            "--quantize: bitsandbytes quantises linears, and this run trained none, but for the output head; export it "
            "without --quantize"
        )
    return found


def write_requantised(
    source: Source, form: Quantised, merged: Path, folder: Path, max_shard_bytes: int, progress: TensorProgress
) -> dict[str, float]:
    """Quantise the adapted linears of a merged model and write it to `folder`; all other weights stay as they are,
    experts that are one parameter too.

    The quantised model is in memory once, on the CPU.

    Args:
        form: a key of `LIMITS`: bitsandbytes' 4 bits (blocks of 64), the same with its scales in 8 bits, or LLM.int8.
        merged: the folder of the merged model.

    Returns:
        each adapted linear's ||W - Q||_F / ||W||_F, W being the merged weight.

    Raises:
        ValueError: the disk refuses.
    """
    loading = source.described.loading
    plain, weights = skeleton(merged, loading), PretrainedWeights(merged)
    origins = weights.origins(plain)
    adapted = linears_of(source, plain)
    others = [
        name for name, module in plain.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in adapted
    ]  # fmt: skip
    model = model_class(plain.config).from_pretrained(
        merged, quantization_config=_config(form, others), device_map={"": "cpu"}, dtype="auto",
        trust_remote_code=loading.trust_remote_code, attn_implementation=attention_of(loading),
    )  # fmt: skip
    errors = {}
    # Before any forward pass: at the first one on a CPU bitsandbytes lays the codes out anew, and would save them so.
    for name in progress(list(adapted)):
        weight = weights.parameter(origins[f"{name}.weight"]).float()
        lost = _dense(model.get_submodule(name)).float() - (weight.t() if adapted[name].transposed else weight)
        errors[name] = (lost.norm() / (weight.norm() or 1.0)).item()  # a matrix of zeros loses nothing
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    except SafetensorError as error:
        raise ValueError(f"{folder}: cannot be written ({error})") from error
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / CONFIG).stat().st_mode)  # safetensors makes files that nobody else can read
    for path in companions(merged, code=True):
        copy = folder / path.relative_to(merged)
        if not copy.exists():  # config.json says how the weights are quantised now
            write_atomic(copy, partial(shutil.copyfile, path))
    write_json(folder / ERRORS, {"storage": form, "layers": errors})
    return errors


def largest_size(planned: MergedPlan, linears: Iterable[str]) -> int:
    """Bytes that the quantised model takes on the disk at most: 8 bits per weight of these linears, and a scale per
    row."""
    quantised = {f"{name}.weight" for name in linears}
    entries = [entry for entries in planned.files.values() for entry in entries]
    return sum(
        5 * entry.spec.shape.numel() // 4 if entry.changed in quantised else nbytes(entry.spec) for entry in entries
    )


def _config(form: Quantised, others: list[str]) -> BitsAndBytesConfig:
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=form == "nf4_double",
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=others,
    )  # fmt: skip


def _dense(module: nn.Module) -> Tensor:
    """The weight (M, N) that a quantised linear of bitsandbytes stands for."""
    from bitsandbytes import functional

    weight: Any = module.weight  # one of bitsandbytes' parameters, which have more attributes than a tensor
    if weight.dtype == torch.int8:
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.dequantize_4bit(weight.data, weight.quant_state)
