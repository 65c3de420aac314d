"""What launch/export.py does: refuse before anything is written, write, publish."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

from sorsa_ds.config.schema import MethodName
from sorsa_ds.export import lora, merged, peft_adapter, requantise
from sorsa_ds.export.card import CARD, card, publish
from sorsa_ds.methods.peft_layers import MUTATING
from sorsa_ds.run.source import Progress, Source, check, open_run
from sorsa_ds.runtime.console import say, tracked
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.whole_folder import whole_folder
from sorsa_ds.sorsa.residual_storage import describe_storage

Format = Literal["merged", "lora", "base", "adapter"]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = "5GB"
_OVER_QUANTISED = {
    "merged": "These weights are what it computed with, made dense.",
    "lora": "This LoRA holds exactly what training changed. It is exact on the model that `--format base` writes, from "
            "which training began; on the pre-trained model itself it is the same change, without the error of the "
            "quantisation that training saw.",
    "base": "This is the model from which it began: the quantised residual made dense, with the initial factors. The "
            "LoRA of the same run (`--format lora`) is exact on it, up to the rounding of --dtype.",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. Options that are None were not given."""

    run: Path
    format: Format
    output: Path
    base: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    max_shard_size: str | None = None
    rank: int | None = None
    push_to_hub: str | None = None
    private: bool = False


def export(options: Options) -> Path:
    """Write the folder `options.output`; returns it.

    Raises:
        ValueError: an option that does not go with the format, a run that is not finished, a base model that is not
            the one that was trained on, a folder that holds something, a disk that is full. Nothing is left then.
    """
    _check_options(options)
    output = options.output.expanduser().resolve()
    _check_free(output)
    source = open_run(options.run.expanduser(), options.base)
    _check_method(options.format, source.described.method)
    lora_plan = merged_plan = None
    if options.format == "lora":
        lora_plan = lora.plan(source, options.rank)
    elif options.format in ("merged", "base"):
        untrained = options.format == "base"
        if untrained and not source.storage.quantised:
            raise ValueError(
                "--format base: the residual was not quantised: a LoRA of this run goes with the base model"
            )
        dtype, size = DTYPES[options.dtype or "auto"], options.max_shard_size or MAX_SHARD_SIZE
        merged_plan = merged.plan(source, dtype, size, untrained)
        again = 0 if options.quantize is None else requantise.largest_size(merged_plan)
        _check_room(output, merged_plan.total_bytes + again)
    check(source, _shown("checking the base model"))
    try:
        with whole_folder(output) as folder:
            notes = []
            if merged_plan is not None:
                if options.quantize is None:
                    merged.write(source, merged_plan, folder, _shown("merging"))
                    notes = _quantised_notes(source, options.format)
                else:
                    notes = _requantised(source, merged_plan, folder, options)
            elif lora_plan is not None:
                errors = lora.write(source, lora_plan, folder, _shown("LoRA"))
                notes = _lora_notes(source, lora_plan, errors)
            elif source.described.method == "sorsa":
                peft_adapter.copy(source, folder, _shown("copying"))
            else:
                peft_adapter.write(source, folder)
            write_text(folder / CARD, card(source, options.format, notes))
    except OSError as error:
        raise ValueError(f"--output: {output} cannot be written: {error.strerror or error}") from error
    for line in notes:
        say(line)
    say(f"Exported to {output}")
    if options.push_to_hub:
        say(f"Published: {publish(output, options.push_to_hub, options.private)}")
    return output


def _shown(what: str) -> Progress:
    return lambda names: tracked(names, len(names), what, "tensor")


def _requantised(source: Source, planned: merged.Plan, folder: Path, options: Options) -> list[str]:
    """Fill a folder with the merged model in 4 or 8 bits, by way of one in 16; returns what to know of it."""
    dense = folder / ".merged"
    dense.mkdir()
    merged.write(source, planned, dense, _shown("merging"))
    size = options.max_shard_size or MAX_SHARD_SIZE
    errors = requantise.write(source, options.quantize, dense, folder, size, _shown("measuring the error"))
    shutil.rmtree(dense)
    worst = max(errors, key=lambda name: errors[name])
    notes = [
        f"{len(errors)} linears are quantised anew ({options.quantize}); loading needs bitsandbytes. "
        f"Relative error of a merged weight, Frobenius norm: mean {mean(errors.values()):.2e}, worst "
        f"{errors[worst]:.2e} ({worst}); all in {requantise.ERRORS}. {requantise.LIMITS[options.quantize]}"
    ]
    if source.storage.quantised:
        notes.append(
            f"Training held the residual quantised too ({describe_storage(source.described.residual)}), "
            "and U, s, V not."
        )
    return notes


def _lora_notes(source: Source, planned: lora.Plan, errors: dict[str, float]) -> list[str]:
    """What the user of this LoRA should know, a sentence each."""
    notes = [lora.served_by_vllm(planned.rank) + "."]
    if planned.truncated:
        worst = max(errors, key=lambda name: errors[name])
        notes.append(
            f"Cut to rank {planned.rank}: relative error of the change of a weight, Frobenius norm: worst "
            f"{errors[worst]:.2e} ({worst}), mean {mean(errors.values()):.2e}; all in {lora.TRUNCATION}."
        )
    if source.storage.quantised:
        notes += _quantised_notes(source, "lora")
    elif source.precision.residual_dtype != torch.float32:
        notes.append(
            "Training held the residual weights in bf16. This LoRA is the exact change of the base model's own "
            "weights, without that rounding; `--format merged` has it."
        )
    if hasattr(source.model.config, "rescale_every"):
        notes.append(
            "Load the base model with rescale_every=0: at inference RWKV halves some of its weights in place, and "
            "would not halve what a LoRA adds to them."
        )
    return notes


def _quantised_notes(source: Source, form: Format) -> list[str]:
    """What quantising the residual means for an export."""
    if not source.storage.quantised:
        return []
    return [
        f"Training held the residual quantised ({describe_storage(source.described.residual)}). {_OVER_QUANTISED[form]}"
    ]


def _check_options(options: Options) -> None:
    whole = ("merged", "base")
    goes_with = {"dtype": whole, "max_shard_size": whole, "rank": ("lora",), "quantize": ("merged",)}
    for name, fitting in goes_with.items():
        if getattr(options, name) is not None and options.format not in fitting:
            raise ValueError(f"--{name} goes with --format {' or '.join(fitting)}, not with {options.format}")
    if options.private and not options.push_to_hub:
        raise ValueError("--private goes with --push_to_hub")


def _check_method(form: Format, method: MethodName) -> None:
    """Stop where a method's runs have no such export.

    Raises:
        ValueError: saying why, and what there is.
    """
    refused = {}
    if method in ("full", "partial"):
        refused = dict.fromkeys(("lora", "base", "adapter"), "whole weights were trained, which no adapter holds")
    elif method in MUTATING:
        refused["adapter"] = (
            "its A and B go with a residual that PEFT would have to decompose again; --format lora is exact on the base"
        )
    elif method in ("dora", "adalora"):
        refused["lora"] = "what it trains is no plain LoRA; --format adapter is in PEFT's format"
    if method != "sorsa":
        refused.setdefault("base", "it goes with SORSA's quantised residual")
    if form in refused:
        raise ValueError(f"--format {form}: not for method {method}: {refused[form]}; --format merged is always there")


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} exists and is not an empty folder; name another one")


def _check_room(output: Path, wanted: int) -> None:
    place = next(folder for folder in output.parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < wanted:
        raise ValueError(f"--output: {output} would take {wanted / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB left")
