"""What launch/export.py does: refuse before anything is written, write, publish."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

from sorsa_ds.console import say, tracked
from sorsa_ds.export import factors, lora, merged
from sorsa_ds.export.card import CARD, card
from sorsa_ds.export.publish import publish
from sorsa_ds.export.source import Progress, Source, check, open_run
from sorsa_ds.files import write_text
from sorsa_ds.whole_folder import whole_folder

Format = Literal["merged", "lora", "adapter"]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. Options that are None were not given."""

    run: Path
    format: Format
    output: Path
    base: str | None = None
    dtype: str | None = None
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
    lora_plan = merged_plan = None
    if options.format == "lora":
        lora_plan = lora.plan(source, options.rank)
    elif options.format == "merged":
        merged_plan = merged.plan(source, DTYPES[options.dtype or "auto"], options.max_shard_size or MAX_SHARD_SIZE)
        _check_room(output, merged_plan.total_bytes)
    check(source, _shown("checking the base model"))
    try:
        with whole_folder(output) as folder:
            notes = []
            if merged_plan is not None:
                merged.write(source, merged_plan, folder, _shown("merging"))
            elif lora_plan is not None:
                errors = lora.write(source, lora_plan, folder, _shown("LoRA"))
                notes = _lora_notes(source, lora_plan, errors)
            else:
                factors.write(source, folder, _shown("copying"))
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


def _lora_notes(source: Source, planned: lora.Plan, errors: dict[str, float]) -> list[str]:
    """What the user of this LoRA should know, a sentence each."""
    notes = [lora.served_by_vllm(planned.rank) + "."]
    if planned.truncated:
        worst = max(errors, key=lambda name: errors[name])
        notes.append(
            f"Cut to rank {planned.rank}: relative error of the change of a weight, Frobenius norm: worst "
            f"{errors[worst]:.2e} ({worst}), mean {mean(errors.values()):.2e}; all in {lora.TRUNCATION}."
        )
    if source.precision.residual_dtype != torch.float32:
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


def _check_options(options: Options) -> None:
    goes_with = {"dtype": "merged", "max_shard_size": "merged", "rank": "lora"}
    for name, fitting in goes_with.items():
        if getattr(options, name) is not None and options.format != fitting:
            raise ValueError(f"--{name} goes with --format {fitting}, not with {options.format}")
    if options.private and not options.push_to_hub:
        raise ValueError("--private goes with --push_to_hub")


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} exists and is not an empty folder; name another one")


def _check_room(output: Path, wanted: int) -> None:
    place = next(folder for folder in output.parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < wanted:
        raise ValueError(f"--output: {output} would take {wanted / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB left")
