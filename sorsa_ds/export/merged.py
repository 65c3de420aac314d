"""A plain Hugging Face model folder, made one tensor at a time: base weights with the trained change merged in, or the
model from which training began over a quantised residual."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedConfig

from sorsa_ds.model.fill import return_freed_memory
from sorsa_ds.model.model_files import CODE, COMPANIONS, CONFIG, INDEX
from sorsa_ds.model.pretrained import PretrainedWeights, all_finite
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.tensor_file import DTYPES, nbytes, write_tensors
from sorsa_ds.model.weight_conversion import Conversion
from sorsa_ds.run import merge
from sorsa_ds.run.source import Source, TensorProgress
from sorsa_ds.runtime.files import write_atomic, write_json, write_text

_NAMES_CODE = ("auto_map", "custom_pipelines")
"""Fields of a configuration that name a model's own code."""

_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NOT_COPIED = ("*.index.json", "*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.safetensors")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written.

    spec: its name, shape and dtype in the export.
    stored: its name in the base model's files.
    changed: the parameter that it is, or is a part of, where training has changed that; else None.
    conversion: the group of stored tensors of which that parameter is made; None where it is this tensor itself.
    """

    spec: TensorSpec
    stored: str
    changed: str | None
    conversion: Conversion | None = None


@dataclass(frozen=True, slots=True)
class MergedPlan:
    """All that will be written.

    files: name -> its tensors, those of wider dtypes first.
    dtype: what was asked for; None: every tensor as the base model has it.
    untied: whether the output head was adapted, and is stored apart from the embedding with which it was tied.
    untrained: whether the model is written as training began.
    """

    files: dict[str, list[Entry]]
    total_bytes: int
    dtype: torch.dtype | None
    untied: bool
    untrained: bool


def plan_merged(source: Source, dtype: torch.dtype | None, max_shard_bytes: int, untrained: bool = False) -> MergedPlan:
    """Which tensor goes into which file, from the headers alone.

    Raises:
        ValueError: a tensor that cannot be written, or an adapted linear that shares its weight with something else
            than the embedding.
    """
    head = source.model.get_output_embeddings()
    heads = {f"{name}.weight" for name, module in source.model.named_modules() if module is head}
    places: dict[str, tuple[str, str | None, Conversion | None]] = {
        name: (name, None, None) for name in _in_groups(source)
    }
    untied = False
    for weight, target in source.changed.items():
        origin = source.weights.origins[weight]
        sharing = [name for name, other in source.weights.origins.items() if other is origin and name != weight]
        if target is None and origin.conversion is None:
            # Tied they were trained as one, and are written once, however often the base has them.
            [stored] = origin.stored
            kept = weight if weight in places else stored
            for name in (weight, *sharing):
                if name != kept:
                    places.pop(name, None)
            places[kept] = (stored, weight, None)
            continue
        if target is None or {f"{place}.weight" for place in target.shared} >= set(sharing):
            sharing = []  # tied they were trained as one
        if sharing and (weight not in heads or origin.conversion is not None):
            raise ValueError(
                f"{weight} is the same tensor as {sharing[0]}, which was trained apart from it: a plain model has no "
                f"place for both; export it with --format lora"
            )
        untied |= bool(sharing)
        for stored in origin.stored:
            places[weight if sharing else stored] = (stored, weight, origin.conversion)
    entries = {name: _entry(source, name, *place, dtype) for name, place in places.items()}
    split = split_state_dict_into_shards_factory(
        entries, get_storage_size=lambda entry: nbytes(entry.spec), max_shard_size=max_shard_bytes,
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    files = {
        file: sorted((entries[name] for name in names), key=lambda entry: -entry.spec.dtype.itemsize)
        for file, names in split.filename_to_tensors.items()
    }
    return MergedPlan(files, split.metadata["total_size"], dtype, untied, untrained)


def write_merged(source: Source, planned: MergedPlan, folder: Path, progress: TensorProgress) -> list[str]:
    """Fill a folder as planned. One tensor is in memory at a time, an adapted one in fp32 and as it is written; of
    experts that are stored one by one, all that make one parameter.

    Returns:
        What is left out of the base model's files, in a sentence, if anything is.

    Raises:
        ValueError: the disk refuses, or a number is too large for the dtype.
    """
    shown = iter(progress([entry.spec.name for entries in planned.files.values() for entry in entries]))
    tensors = _Tensors(source, planned.untrained)
    for file, entries in planned.files.items():
        write_tensors(folder / file, [entry.spec for entry in entries], tensors.of(entries, shown))
    next(shown, None)  # lets the progress bar end
    if len(planned.files) > 1:
        where = {entry.spec.name: file for file, entries in planned.files.items() for entry in entries}
        index = {"metadata": {"total_size": planned.total_bytes}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, index)
    PretrainedWeights(folder)  # every header reads back, and every file is as long as it says
    left_out = _copy_companions(source.base, folder, source.trust_remote_code)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if planned.dtype is not None:
        config.setdefault("dtype", "")
        _set_dtype(config, str(planned.dtype).removeprefix("torch."))
    if planned.untied:
        config["tie_word_embeddings"] = False
    if source.described.new_tokens:
        _set_vocabulary(config, source.model.config)
    write_json(folder / CONFIG, config)
    if not left_out:
        return []
    return [
        f"The base model's own code is left out ({', '.join(left_out)}): transformers' code was used in training; "
        f"--trust_remote_code copies it along."
    ]


def companions(base: Path, code: bool) -> list[Path]:
    """The base model's files that go with any weights: configuration, tokenizer, chat templates.

    Args:
        code: whether its own Python belongs to them.
    """
    found = [*base.iterdir(), *base.glob("additional_chat_templates/*")]
    left_out = _NOT_COPIED if code else (*_NOT_COPIED, CODE)
    return sorted(
        path for path in found
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in (*COMPANIONS, CODE))
        and not any(fnmatch(path.name, pattern) for pattern in left_out)
    )  # fmt: skip


def _copy_companions(base: Path, folder: Path, code: bool) -> list[str]:
    """Copy what goes with any weights; returns the names of the files of code that are not copied.

    Without the code nothing may refer to it: whoever loads the copy with trust_remote_code would miss it, or get it
    from another repository that the reference names.
    """
    for path in companions(base, code):
        copy = folder / path.relative_to(base)
        text = None if code or path.suffix != ".json" else _without_code(path)
        if text is None:
            write_atomic(copy, partial(shutil.copyfile, path))
        else:
            write_text(copy, text)
    return [] if code else sorted(path.name for path in base.glob(CODE))


def _without_code(path: Path) -> str | None:
    """A JSON file without its references to code; None where it has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # it is nobody's configuration then
        return None
    cleaned = _stripped(content)
    return None if cleaned == content else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def _stripped(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _stripped(value) for key, value in content.items() if key not in _NAMES_CODE}


def _in_groups(source: Source) -> list[str]:
    """The names of the base model's tensors, with those next to each other that are converted together."""
    together = {name: origin.stored for origin in source.weights.origins.values() for name in origin.stored}
    names = source.weights.pretrained.names
    return list(dict.fromkeys(one for name in names for one in together.get(name, (name,))))


def _entry(
    source: Source,
    name: str,
    stored: str,
    changed: str | None,
    conversion: Conversion | None,
    dtype: torch.dtype | None,
) -> Entry:
    stored_as, shape = source.weights.pretrained.header(stored)
    if stored_as not in DTYPES:
        raise ValueError(f"{source.base}: {stored} is stored as {stored_as}, which cannot be exported")
    if changed is not None and conversion is None and source.changed[changed] is None:
        shape = source.model.get_parameter(changed).shape  # with the rows of new tokens
    own = DTYPES[stored_as]
    spec = TensorSpec(name, shape, dtype if dtype is not None and own in _WIDE else own)
    return Entry(spec, stored, changed, conversion)


class _Tensors:
    """Makes the tensors of an export, one after the other."""

    def __init__(self, source: Source, untrained: bool):
        self._source = source
        self._untrained = untrained
        self._reverted: dict[str, Tensor] = {}
        """What is still to be written of the last group of stored tensors that was made."""

    def of(self, entries: list[Entry], shown: Iterator[str]) -> Iterator[Tensor]:
        """The tensors of some entries, as they are written.

        Args:
            shown: is advanced once for each.

        Raises:
            ValueError: a number in one is too large for its dtype.
        """
        for entry in entries:
            next(shown)
            yield self._tensor(entry)

    def _tensor(self, entry: Entry) -> Tensor:
        if entry.changed is None:
            return _rounded(self._source.weights.pretrained.read(entry.stored), entry.spec)
        if entry.conversion is None:
            return self._parameter(entry.changed, entry.spec)
        if entry.stored not in self._reverted:
            self._reverted.clear()
            names = entry.conversion.parameters
            self._reverted = entry.conversion.revert({name: self._parameter(name, entry.spec) for name in names})
        return self._reverted.pop(entry.stored)

    def _parameter(self, name: str, spec: TensorSpec) -> Tensor:
        """A parameter as training left it, in the dtype in which it, or what it is stored as, is written."""
        return_freed_memory()  # of the parameter before it
        if name not in self._source.changed:  # it is stored in one tensor with one that is
            return _rounded(self._source.weights.parameter(name), spec)
        return _rounded(merge.merged(self._source, name, self._untrained), spec)


def _rounded(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """A tensor in the dtype in which it is written.

    Raises:
        ValueError: a number in it is too large for that dtype.
    """
    if tensor.dtype == spec.dtype:
        return tensor
    written = tensor.to(spec.dtype)
    if written.dtype == torch.float16 and not all_finite(written) and all_finite(tensor):
        raise ValueError(f"{spec.name} holds numbers too large for {spec.dtype}: choose another --dtype")
    return written


def _set_vocabulary(config: dict, resolved: PreTrainedConfig) -> None:
    """Put the number of rows of the trained model's embeddings, which `resolved` is of, where it belongs."""
    text = resolved.get_text_config()
    inner = next((name for name, part in vars(resolved).items() if part is text), None)
    holder = config if inner is None else config.setdefault(inner, {})
    holder[text.attribute_map.get("vocab_size", "vocab_size")] = text.vocab_size


def _set_dtype(config: dict, name: str) -> None:
    """Put the dtype wherever a configuration, or one inside it, names one."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    config.update(dict.fromkeys(keys, name))
    for inner in config.values():
        if isinstance(inner, dict):
            _set_dtype(inner, name)
