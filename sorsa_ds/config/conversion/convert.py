"""From another trainer's file to settings of this one: which key is which, and what the result is."""

import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sorsa_ds.config.conversion.finish import finish
from sorsa_ds.config.conversion.foreign import read_foreign
from sorsa_ds.config.conversion.meaning import meaning, path_of
from sorsa_ds.config.conversion.result import Conversion, is_off, is_on
from sorsa_ds.config.conversion.rules import RULES
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import Given, build_settings, check_value, to_yaml
from sorsa_ds.runtime.console import printable
from sorsa_ds.runtime.words import cut

_FIRST = ("max_steps", "learning_rate", "lr_scheduler", "lr_scheduler_type", "datasets", "dataset", "dataset_name",
          "lora_target_linear", "max_samples")  # fmt: skip
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
    if unknown := [key for key in without if key not in keys and key != kind.targets]:
        raise ValueError(f"--without {', '.join(unknown)}: {file} has no such key")
    made = Conversion(file=file, kind=kind, keys=keys, gpus=gpus, steps=steps, method=method)
    for key in dict.fromkeys([*(key for key in _FIRST if key in keys), *keys]):
        if key in without:
            made.leave(key, "left out as asked")
        else:
            _take(made, key, keys[key])
    _take_defaults(made, without)
    finish(made, without)
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
    found = meaning(key)
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


def _take_defaults(made: Conversion, without: Collection[str]) -> None:
    """What the other trainer takes where the file says nothing, if this one takes something else."""
    adapter = made.kind.adapter_defaults if is_on(made.keys.get("use_peft")) else {}
    for key, value in {**made.kind.defaults, **adapter}.items():
        path = path_of(key)
        assert path, f"{key} is no key that is known"
        said = path in made.settings or any(path_of(other) == path for other in [*made.keys, *without])
        if not said:
            _take(made, key, value)
            made.defaulted.append(f"{key}={value}")


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
