"""From another trainer's file to settings of this one: which key is which, and what the result is."""

import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sorsa_ds.config import other_names
from sorsa_ds.config.conversion.foreign import read_foreign
from sorsa_ds.config.conversion.result import Conversion, is_off, is_on
from sorsa_ds.config.conversion.rules import RULES
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import Given, build_settings, check_value, to_yaml
from sorsa_ds.runtime.console import printable
from sorsa_ds.runtime.words import cut

_FIRST = ("max_steps", "learning_rate", "datasets", "dataset", "dataset_name", "lora_target_linear", "max_samples")
"""Keys that are looked at first, because what others mean depends on them."""

_FINE: dict[str, tuple[Any, ...]] = {"stage": ("sft", "pt"), "task_type": ("CAUSAL_LM",), "bias": ("none",)}
"""Keys that only one value makes the same as here -> these values."""


def convert(
    file: Path, *, gpus: int | None = None, steps: int | None = None, method: str | None = None,
    without: Collection[str] = (),
) -> Conversion:  # fmt: skip
    """Convert a file.

    Args:
        gpus: ranks of the run, for the batch of all of them. steps: optimizer steps of the run, where something is a
            share of them.
        method: the one to train with; None: the file's, and SORSA in the place of LoRA.
        without: keys that are left out although something else is learned then.

    Raises:
        ValueError: the file cannot be read, is of no kind that is known, or would train something else. The message
            names every key of these, and how to go on.
    """
    kind, keys = read_foreign(file)
    if unknown := [key for key in without if key not in keys]:
        raise ValueError(f"--without {', '.join(unknown)}: {file} has no such key")
    made = Conversion(file=file, kind=kind, keys=keys, gpus=gpus, steps=steps, method=method)
    for key in dict.fromkeys([*(key for key in _FIRST if key in keys), *keys]):
        if key in without:
            made.leave(key, "left out as asked")
        else:
            _take(made, key, keys[key])
    _take_defaults(made, without)
    _finish(made)
    if made.refused:
        told = "\n".join(f"  {key}: {why}" for key, why in made.refused.items())
        raise ValueError(
            f"{file}: the run would learn something else without these keys of {kind.title}:\n{printable(told)}\n"
            f"To leave them out all the same: --without {','.join(made.refused)}"
        )
    return made


def _take(made: Conversion, key: str, value: Any) -> None:
    """Carry one key over, leave it out, or refuse it."""
    if value is None or value in ("", [], {}):
        made.unset.append(key)
        return
    if key in _FINE:
        if value not in _FINE[key]:
            made.refuse(key, f"{value!r}: here it is {' or '.join(map(str, _FINE[key]))}")
        return
    found = other_names.here(key) or _by_own_name(key)
    if found is None:
        made.leave(key, "this program does not know it")
    elif not found.path:
        if is_off(value):
            made.unset.append(key)
        elif found.alters:
            made.refuse(key, found.why)
        else:
            made.leave(key, found.why)
    elif found.path.startswith("--"):
        made.leave(key, f"an option of the command: {found.path} {cut(str(value))}")
    elif (rule := RULES.get(found.path if found.value is None else f"{found.path}={found.value}")) is not None:
        rule(made, key, value)
    elif found.value is None:
        made.set(found.path, value, key)
    elif is_on(value):
        made.set(found.path, found.value, key)
    elif is_off(value):
        made.unset.append(key)
    else:
        made.refuse(key, f"{value!r} is neither on nor off")


def _by_own_name(key: str) -> other_names.Here | None:
    """The setting whose own name, without its section, is the same; None where none or several are."""
    named = [path for path in leaves(RunConfig) if path.rpartition(".")[2] == key]
    return other_names.Here(named[0]) if len(named) == 1 else None


def _take_defaults(made: Conversion, without: Collection[str]) -> None:
    """What the other trainer takes where the file says nothing, if this one takes something else."""
    for key, value in made.kind.defaults.items():
        found = other_names.here(key) or _by_own_name(key)
        assert found is not None, f"{key} is no key that is known"
        said = found.path in made.settings or any(_path(other) == found.path for other in [*made.keys, *without])
        if not said:
            _take(made, key, value)
            made.defaulted.append(f"{key}={value}")


def _path(key: str) -> str:
    """The setting that a key stands for; empty where it stands for none."""
    found = other_names.here(key) or _by_own_name(key)
    return found.path if found is not None else ""


def _finish(made: Conversion) -> None:
    """What follows from several keys at once."""
    _finish_method(made)
    micro, each = made.value("train.micro_batch_size"), made.value("train.gradient_accumulation_steps") or 1
    if made.gpus is not None and isinstance(micro, int) and isinstance(each, int):
        if "train.global_batch_size" not in made.settings:
            made.settings["train.global_batch_size"] = micro * each * made.gpus, "--gpus"
        if (each := made.settings.pop("train.gradient_accumulation_steps", None)) is not None:
            made.notes[each[1]] = "it is within train.global_batch_size, and follows on any number of GPUs"


def _finish_method(made: Conversion) -> None:
    """The method of training, and what a file leaves to follow from it."""
    adapters = any(_path(key).startswith("adapter.") and not is_off(value) for key, value in made.keys.items())
    if made.method is not None:
        made.settings["method"] = made.method, "--method"
    elif "method" not in made.settings and made.kind.title == "axolotl" and is_off(made.keys.get("adapter")):
        made.settings["method"] = "full", "adapter"
        made.notes["adapter"] = "without one, axolotl trains all weights; --method sorsa trains an adapter"
    elif "method" not in made.settings:
        made.settings["method"] = "sorsa", "method"
        told = "SORSA takes the place of LoRA; --method lora keeps LoRA"
        made.notes["method"] = told if adapters else "the file does not say it: SORSA, as this program's defaults"
        if adapters and "train.learning_rate" in made.settings:
            made.notes["learning_rate"] = "SORSA wants a much smaller one than LoRA: docs/sorsa_for_lora_users.md"
        if "adapter.alpha" in made.settings:
            made.notes[made.settings["adapter.alpha"][1]] = "SORSA's own scale is 1: without adapter.alpha"
    rank = made.value("adapter.rank")
    if made.kind.title == "LLaMA-Factory" and isinstance(rank, int) and _says_no(made, "adapter.alpha"):
        made.settings["adapter.alpha"] = 2 * rank, "lora_alpha"
        made.defaulted.append(f"lora_alpha={2 * rank}")


def _says_no(made: Conversion, path: str) -> bool:
    """Whether no key of the file is about a setting."""
    return path not in made.settings and not any(_path(key) == path for key in made.keys)


def settings_of(made: Conversion) -> RunConfig:
    """The settings, checked.

    Raises:
        ValueError: a value is not one that the setting can have, or some contradict others; all are named.
    """
    known, faults, values = leaves(RunConfig), [], {}
    for path, (value, key) in made.settings.items():
        try:
            values[path] = check_value(known[path], Given(value, None, f"{made.file}: {key}"))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return build_settings(RunConfig, values)


def told(made: Conversion) -> Iterator[str]:
    """Sentences on what was not carried over, and on what is not quite the same."""
    if made.defaulted:
        yield f"{made.kind.title}'s defaults, which the file does not say: {', '.join(made.defaulted)}."
    for why in dict.fromkeys(made.left.values()):
        yield f"Not carried over: {', '.join(key for key, one in made.left.items() if one == why)} ({why})."
    for key, note in made.notes.items():
        yield f"{key}: {note}."
    if made.unset:
        yield f"Unset there: {', '.join(made.unset)}."
    if not any(path in made.settings for path in ("data.path", "data.mix")):
        yield "The file names no data: set data.path, or the generated word problems are trained on."


def as_yaml(made: Conversion, config: RunConfig) -> str:
    """The settings as a file for --config, with what `told` says at its top."""
    said = [f"Converted from {made.file.name}, settings of {made.kind.title}.", *told(made)]
    lines = [
        line
        for text in said
        for line in textwrap.wrap(printable(text), 110, initial_indent="# ", subsequent_indent="#   ")
    ]
    return "\n".join(lines) + "\n" + to_yaml(config, only=made.settings.keys())
