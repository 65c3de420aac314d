"""An adapter in PEFT's format: what its description may ask for, and putting it on its base model.

The description may be anybody's. It says what was trained; it may choose neither code, nor other models or adapters,
nor files: PEFT itself would import, download or read what some of its fields name.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from safetensors import safe_open
from transformers import PreTrainedModel

from sorsa_ds.config.declare import Name, Rank
from sorsa_ds.config.typed_json import typed
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.new_tokens import grow_tables
from sorsa_ds.model.peft_names import CONFIG, ONLY_ADAPTER, PREFIX, WEIGHTS
from sorsa_ds.runtime.line_process import LineProcess
from sorsa_ds.runtime.words import cut

KINDS = frozenset((
    "LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "SHIRA", "OSF", "PEANUT", "POLY", "PSOFT",
    "PVERA", "RANDLORA", "ROAD", "SORSA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA",
    "WAVEFT",
))  # fmt: skip
"""Kinds of adapters (`peft_type`) that are weights for a model's own layers. The others put prompts before the text, or
bring further models or adapters."""

REFUSED_FIELDS = {
    "megatron_config": "with it PEFT imports a module that the description names (megatron_core)",
    "layer_replication": "with it PEFT makes as many layers of the base model as the description says",
}
"""Fields of a description that may not be set -> the reason, as half a sentence."""


_LARGEST = 10**9
"""The largest number in a description, whatever it is for: a size takes memory, a scale has to stay finite."""

_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Fields whose texts, or whose keys, PEFT matches with the names of a model's modules."""

_SECONDS = 10.0
_MEMORY = 2**30

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Checked:
    """The base model and the ranks in a description. Ranks decide how much memory PEFT takes before it reads tensors.

    rank_pattern: ranks of single layers; with AdaLoRA, which of a layer's ranks are left.
    """

    base_model_name_or_path: Name | None = None
    r: Rank | None = None
    init_r: Rank | None = None
    target_r: Rank | None = None
    rank_pattern: dict[str, Rank | Annotated[list[bool], Field(min_length=1)]] | None = None


def base_model_of(folder: Path, described: dict[str, Any], base: str | None) -> str:
    """The folder or hub name of the base model, after a look at everything that the description asks for.

    Args:
        described: the content of adapter_config.json.
        base: the base model that the user names, which goes before that of the description.

    Raises:
        ValueError: the description asks for something that it may not choose, or names no base model.
    """
    path = folder / CONFIG
    if not isinstance(kind := described.get("peft_type"), str) or kind not in KINDS:
        raise ValueError(f"--model: {path}: adapters of the kind {kind!r} (peft_type) are not read")
    try:
        typed(_Checked, {field.name: described[field.name] for field in fields(_Checked) if field.name in described})
    except ValueError as error:
        raise ValueError(f"--model: {path}: not PEFT's description of an adapter ({error})") from error
    for place, number in _numbers(described):
        if not abs(number) <= _LARGEST:  # which is true of NaN too
            raise ValueError(f"--model: {path}: {place} is {cut(str(number))}; numbers up to {_LARGEST:,} are read")
    for refused, reason in REFUSED_FIELDS.items():
        if described.get(refused):
            raise ValueError(f"--model: {path} sets {refused}, which is not supported: {reason}; remove it")
    name = base or described.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"--model: {path} names no base model; say it: --base FOLDER")
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"--model: {folder} has no {WEIGHTS}; other formats are not read")
    return name


def check_tensors(folder: Path) -> None:
    """Stop at a tensor of the adapter that cannot be what was trained; reads all of them.

    Raises:
        ValueError: the file is damaged or empty, or a tensor is not of finite floating-point numbers.
    """
    file = FactorFile(folder / WEIGHTS)
    if not file.names:
        raise ValueError(f"--model: {folder / WEIGHTS} holds no tensor")
    for name in file.names:
        file.tensor(name)


def check_patterns(path: Path, described: dict[str, Any], modules: list[str]) -> None:
    """Stop at a pattern of the description that PEFT could not match with the names of a model's modules in some time.

    Raises:
        ValueError: a pattern is no regular expression, or matching takes too much time or memory.
    """
    values = [described.get(field) for field in _PATTERNS]
    texts = [str(text) for value in values for text in ([value] if isinstance(value, str) else value or ())]
    patterns = [text for text in texts if not re.fullmatch(r"[\w.-]*", text)]
    if not patterns:
        return
    process = LineProcess("sorsa_ds.evaluate.pattern_process", seconds=_SECONDS, memory=_MEMORY)
    try:
        told = process.ask({"patterns": patterns, "names": modules})["fault"]
    except TimeoutError:
        told = f"matching its patterns with the names of the model's modules was stopped after {_SECONDS:g} s"
    except ChildProcessError as error:
        told = f"matching its patterns with the names of the model's modules ended the process ({error})"
    finally:
        process.end()
    if told:
        raise ValueError(f"--model: {path}: {cut(told)}")


def put_on(model: PreTrainedModel, folder: Path, described: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The base model with the adapter, merged into its weights unless these are quantised.

    Raises:
        ValueError: PEFT is not installed or refuses the adapter, or tensors of the adapter have no place in this model,
            or places in it are left without a tensor.
    """
    try:
        from peft import PeftModel

        import sorsa_ds.peft  # noqa: F401  # PEFT knows SORSA's adapters then
    except ImportError as error:
        raise ValueError(f"--model: {folder} needs the package peft, which is not installed") from error
    check_tensors(folder)
    check_patterns(folder / CONFIG, described, [name for name, _ in model.named_modules()])
    _grow(model, folder)
    quantised = getattr(model, "hf_quantizer", None) is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is refused below
            adapted = PeftModel.from_pretrained(
                model, folder, adapter_name=ONLY_ADAPTER, torch_device=str(device)
            ).eval()
            # Only the second reading says which tensors found no place, and which places got none.
            result = adapted.load_adapter(str(folder), ONLY_ADAPTER, torch_device=str(device))
    except Exception as error:  # PEFT and torch refuse in many ways
        raise ValueError(f"--model: {folder} is no adapter for this base model: {error}") from error
    _refuse_partial(folder, len(FactorFile(folder / WEIGHTS).names), result)
    # A PeftModel is no PreTrainedModel, but it passes all calls on to the one that it wraps.
    whole = cast(PreTrainedModel, adapted if quantised else adapted.merge_and_unload())
    for name, parameter in whole.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise ValueError(
                f"--model: {folder}: with this adapter {name} is not finite: its scale (lora_alpha) is off"
            )
    return whole


def _grow(model: PreTrainedModel, folder: Path) -> None:
    """Give the base model the rows that the adapter's embeddings have beyond its own: those of new tokens."""
    name = next((name for name, one in model.named_modules() if one is model.get_input_embeddings()), "")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        key = f"{PREFIX}{name}.weight"
        rows = file.get_slice(key).get_shape()[0] if key in file.keys() else 0  # noqa: SIM118 (safe_open is no mapping)
    grow_tables(model, rows)


def _refuse_partial(folder: Path, stored: int, result: Any) -> None:
    """Stop where PEFT could not bring adapter and base model together in full.

    Args:
        stored: the number of tensors in the adapter's file.
        result: what PEFT's `load_adapter` returns.
    """
    for what, names in (
        (f"of its {stored} tensors {len(result.unexpected_keys)} have no place in the base model", "unexpected_keys"),
        (f"the base model has {len(result.missing_keys)} places for which it holds no tensor", "missing_keys"),
    ):
        if found := list(getattr(result, names)):
            raise ValueError(
                f"--model: {folder} does not fit its base model: {what}, first {', '.join(found[:_SHOWN])}; name the "
                f"model that it was trained on: --base FOLDER"
            )


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a description, at any depth, after the dotted name of its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}" if place else cut(str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, place)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value
