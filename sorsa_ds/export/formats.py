"""The formats of an export: what each will write, how it writes it, and what a reader of the export should know."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from sorsa_ds.export import merged, requantise
from sorsa_ds.export.adapter import copy_adapter
from sorsa_ds.export.options import AUTO, Format, Options, Quantised
from sorsa_ds.run.peft_files import lora
from sorsa_ds.run.peft_files.notes import lora_notes, quantised_note
from sorsa_ds.run.peft_files.own_kind import write_peft_adapter
from sorsa_ds.run.source import Source, TensorProgress
from sorsa_ds.runtime.console import tracked
from sorsa_ds.sorsa.residual_storage import describe_storage

_OVER_QUANTISED: dict[Format, str] = {
    "merged": "These weights are what it computed with, made dense.",
    "base": "This is the model from which it began: the quantised residual made dense, with the initial factors. The "
            "LoRA of the same run (`--format lora`) is exact on it, up to the rounding of --dtype.",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """An export whose options were found good.

    nbytes: size on the disk at most, where that is worth a check; else 0.
    write: fills an empty folder, and returns notes for the card and the console, a sentence or two each.
    """

    nbytes: int
    write: Callable[[Path], list[str]]


def prepare(source: Source, options: Options) -> Prepared:
    """Plan the export of a run; no weight is read.

    Raises:
        ValueError: the method's runs have no such export, or an option does not go with this run.
    """
    refused = source.method.refused_exports
    if options.format in refused:
        raise ValueError(
            f"--format {options.format}: not for method {source.method.name}: {refused[options.format]}; "
            f"--format merged works for every method"
        )
    return _PREPARE[options.format](source, options)


def _prepare_merged(source: Source, options: Options) -> Prepared:
    planned = merged.plan_merged(source, _dtype_of(options), options.shard_bytes)
    if options.quantize is not None:
        linears = requantise.linears_of(source, source.model)
        write = partial(_write_requantised, source, planned, options.quantize, options.shard_bytes)
        return Prepared(planned.total_bytes + requantise.largest_size(planned, linears), write)
    return Prepared(planned.total_bytes, partial(_write_merged, source, planned, options.format))


def _dtype_of(options: Options) -> torch.dtype | None:
    """The dtype of all written tensors; None: each as the base model has it."""
    return None if options.dtype in (None, AUTO) else getattr(torch, options.dtype)


def _prepare_base(source: Source, options: Options) -> Prepared:
    if not source.storage.quantised:
        raise ValueError("--format base: the residual was not quantised: a LoRA of this run goes with the base model")
    planned = merged.plan_merged(source, _dtype_of(options), options.shard_bytes, untrained=True)
    return Prepared(planned.total_bytes, partial(_write_merged, source, planned, options.format))


def _prepare_lora(source: Source, options: Options) -> Prepared:
    with _named("lora"):
        planned = lora.plan_lora(source, options.rank)

    def write(folder: Path) -> list[str]:
        errors = lora.write_lora(source, planned, folder, shown_per_tensor("LoRA"))
        return _lora_notes(source, planned, errors)

    return Prepared(0, write)


def _prepare_adapter(source: Source, options: Options) -> Prepared:
    def write(folder: Path) -> list[str]:
        if source.method.adapter_library == "peft":
            with _named("adapter"):
                write_peft_adapter(source, folder)
        else:
            copy_adapter(source, folder, shown_per_tensor("copying"))
        return []

    return Prepared(0, write)


_PREPARE: dict[Format, Callable[[Source, Options], Prepared]] = {
    "merged": _prepare_merged, "lora": _prepare_lora, "base": _prepare_base, "adapter": _prepare_adapter,
}  # fmt: skip


def _write_merged(source: Source, planned: merged.MergedPlan, form: Format, folder: Path) -> list[str]:
    left_out = merged.write_merged(source, planned, folder, shown_per_tensor("merging"))
    return [*_quantised_notes(source, form), *left_out]


def _write_requantised(
    source: Source, planned: merged.MergedPlan, storage: Quantised, shard_bytes: int, folder: Path
) -> list[str]:
    """Fill a folder with the merged model in 4 or 8 bits, by way of the dense one."""
    dense = folder / ".merged"
    dense.mkdir()
    left_out = merged.write_merged(source, planned, dense, shown_per_tensor("merging"))
    errors = requantise.write_requantised(
        source, storage, dense, folder, shard_bytes, shown_per_tensor("measuring the error")
    )
    shutil.rmtree(dense)
    worst = max(errors, key=lambda name: errors[name])
    quantised = sum(source.model.get_parameter(f"{name}.weight").numel() for name in errors)
    share = quantised / sum(entry.spec.shape.numel() for entries in planned.files.values() for entry in entries)
    notes = [
        f"{len(errors)} linears, {share:.1%} of all weights, are quantised anew ({storage}), the others not; loading "
        f"needs bitsandbytes. Relative error of a merged weight, Frobenius norm: mean {mean(errors.values()):.2e}, "
        f"worst {errors[worst]:.2e} ({worst}); all in {requantise.ERRORS}. {requantise.LIMITS[storage]}"
    ]
    if experts := [target for target in source.targets if target.experts]:
        whole = sum(target.numel for target in experts)
        notes.append(f"Experts stay dense, {whole:,} numbers: bitsandbytes packs linears alone.")
    if source.storage.quantised:
        notes.append(
            f"Training held the residual quantised too ({describe_storage(source.described.residual)}), "
            "and U, s, V not."
        )
    return [*notes, *left_out]


def _lora_notes(source: Source, planned: lora.LoraPlan, errors: dict[str, float]) -> list[str]:
    """What the user of this LoRA should know."""
    notes = lora_notes(source, planned)
    if planned.truncated:
        worst = max(errors, key=lambda name: errors[name])
        notes.append(
            f"Cut to rank {planned.rank}: relative error of the change of a weight, Frobenius norm: worst "
            f"{errors[worst]:.2e} ({worst}), mean {mean(errors.values()):.2e}; all in {lora.TRUNCATION}."
        )
    return notes


def _quantised_notes(source: Source, form: Format) -> list[str]:
    """What it means for an export that training held the residual quantised."""
    return [quantised_note(source, _OVER_QUANTISED[form])] if source.storage.quantised else []


@contextmanager
def _named(form: Format) -> Iterator[None]:
    """Context that puts the format in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--format {form}: {error}") from error


def shown_per_tensor(what: str) -> TensorProgress:
    """A progress bar over tensors."""
    return lambda names: tracked(names, len(names), what, "tensor")
