"""The pre-trained weights on disk: find their folder, learn which files hold which parameter, read one at a time."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.config.schema import EMBEDDED_MODEL, LoadingConfig
from sorsa_ds.model.architectures import register_architecture
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.model.model_files import (
    CODE,
    COMPANIONS,
    check_model_name,
    check_no_adapter,
    damaged,
    refuse_other_formats,
    weight_files,
)
from sorsa_ds.model.weight_conversion import Conversion, Origin, find_origins
from sorsa_ds.runtime import digest, hub
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.waiting import first_of_node

_DTYPES = ("F64", "F32", "F16", "BF16")
_PACKED = ("_blocks", "_scales", ".qweight", ".weight_scale_inv", ".weight_scale", ".weight.absmax")
"""Ends of the names of tensors that go with quantised weights."""
_NOT_QUANTISED = (
    "take a copy of the model in bf16, fp16 or fp32, or make one: load it with transformers' "
    "from_pretrained(..., quantization_config=...), with dequantize=True in that configuration, and save_pretrained it"
)

REOPEN_BYTES = 2**26
"""Number of bytes that may be read before the files are closed, which gives their memory back. A larger tensor is read
whole."""


def find_model(model: str, loading: LoadingConfig) -> Path:
    """The folder of the configured model; the embedded one is converted first if it never was.

    Raises:
        ValueError: there is no such model, its folder holds an adapter too, or its architecture needs a package that is
            not installed.
    """
    if model == EMBEDDED_MODEL:
        return ensure_embedded_model(say)
    folder = find_folder(model, loading)
    check_no_adapter(folder)
    register_architecture(folder)
    return folder


def find_folder(model: str, loading: LoadingConfig) -> Path:
    """The folder of a model, or of an adapter, given as a folder or a hub name, which one rank of each node downloads.

    A collective call. The download goes into Hugging Face's cache.

    Raises:
        ValueError: the model is neither a folder nor one that the hub gives.
    """
    check_model_name(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    return Path(first_of_node(lambda: _downloaded(model, loading), f"downloading {model}"))


def find_companions(model: str, loading: LoadingConfig) -> Path:
    """The folder of a model, of which only what lies beside its weights is needed and downloaded.

    Raises:
        ValueError: there is no such model, or its folder here holds an adapter too, or its architecture needs a package
            that is not installed (see `find_model`).
    """
    check_model_name(model)
    folder = Path(model).expanduser()
    if model == EMBEDDED_MODEL or folder.is_dir():
        return find_model(model, loading)

    def download(local_files_only: bool) -> str:
        patterns = [*COMPANIONS, *([CODE] if loading.trust_remote_code else [])]
        return snapshot_download(
            model, revision=loading.revision, allow_patterns=patterns, local_files_only=local_files_only
        )

    try:
        folder = hub.fetched(model, loading.revision, download, say)
    except ValueError as error:
        raise ValueError(f"model: {model!r} is no folder here: {error}") from error
    register_architecture(folder)
    return folder


def _downloaded(model: str, loading: LoadingConfig) -> str:
    def download(local_files_only: bool) -> str:
        return snapshot_download(
            model,
            revision=loading.revision,
            allow_patterns=["*.safetensors", *COMPANIONS, CODE],
            ignore_patterns=None if loading.trust_remote_code else [CODE],
            local_files_only=local_files_only,
        )

    try:
        folder = hub.fetched(model, loading.revision, download, say)
        others = [] if any(folder.glob("*.safetensors")) else HfApi().list_repo_files(model, revision=loading.revision)
    except Exception as error:
        raise ValueError(f"model: {model!r} is no folder here: {error}") from error
    refuse_other_formats(model, others)
    return str(folder)


class PretrainedWeights:
    """The weights of a folder of safetensors files: one file, or shards with an index.

    Raises:
        ValueError: the folder holds no safetensors (pickle files are refused, and the message has the command that
            converts them), or a shard is missing, truncated or damaged; the message names the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for file in weight_files(folder):
            with _opened(file) as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))
        self._open: dict[Path, safe_open] = {}
        self._bytes_read = 0

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the files."""
        return list(self._file_of)

    def header(self, name: str) -> tuple[str, torch.Size]:
        """(dtype as safetensors calls it, shape) of a tensor that is not read."""
        entry = self._opened(name).get_slice(name)
        return entry.get_dtype(), torch.Size(entry.get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its dtype on disk."""
        tensor = self._mapped(name)
        # An open file keeps every page resident that was ever read, and opening one parses its whole header.
        if self._bytes_read and self._bytes_read + tensor.nbytes > REOPEN_BYTES:
            self._open.clear()
            self._bytes_read = 0
            tensor = self._mapped(name)
        self._bytes_read += tensor.nbytes
        return tensor

    def parameter(self, origin: Origin) -> Tensor:
        """A parameter as the model has it, on the CPU, in its dtype on disk.

        Only the stored tensors that it is made of are read.
        """
        if origin.conversion is None:
            return self.read(origin.stored[0])
        return origin.conversion.convert(self.read)[origin.parameter]

    def origins(self, model: PreTrainedModel) -> dict[str, Origin]:
        """Map each parameter and persistent buffer of the model (any alias of tied ones) to what it is made of.

        Call it before any linear is replaced. Names are changed, and tensors merged and split, as transformers does it.
        No weight is read, but those that are tied and stored apart.

        Raises:
            ValueError: a parameter is missing, wholly or in part (the message names it), has another shape in the
                files, is quantised, or is stored twice; or two parameters that are tied are stored with different
                values.
        """
        if quantised := getattr(model.config, "quantization_config", None):
            raise ValueError(f"{self.folder}: its weights are quantised ({_quantised_by(quantised)}); {_NOT_QUANTISED}")
        try:
            origins = find_origins(model, {name: self.header(name)[1] for name in self._file_of})
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error
        meta, aliases = model.state_dict(), _aliases(model)
        missing = [name for name in meta if not any(alias in origins for alias in aliases.get(name, (name,)))]
        if missing:
            packed = [key for key in self._file_of if key.endswith(_PACKED)]
            why = f" It has {packed[0]}: weights that are quantised; {_NOT_QUANTISED}." if packed else ""
            raise ValueError(
                f"{self.folder} lacks {len(missing)} parameters of {type(model).__name__}, first "
                f"{', '.join(missing[:3])}.{why}"
            )
        for names in aliases.values():
            sources = {origins[name].stored: origins[name] for name in sorted(names) if name in origins}
            if len(sources) > 1 and len({digest.of_tensor(self.parameter(one)) for one in sources.values()}) > 1:
                raise ValueError(
                    f"{self.folder}: {' and '.join(sorted(stored[0] for stored in sources))} are tied by config.json "
                    f"(tie_word_embeddings) but stored with different values; set tie_word_embeddings to false there, "
                    f"or remove the one not meant"
                )
            origins.update(dict.fromkeys(names, sources[min(sources)]))
        for name, parameter in meta.items():
            self._check_form(name, origins[name], parameter)
        return origins

    def _check_form(self, name: str, origin: Origin, parameter: Tensor) -> None:
        key, conversion = origin.stored[0], origin.conversion
        dtypes = {self.header(key)[0]: key for key in reversed(origin.stored)}
        if bad := [dtype for dtype in dtypes if parameter.is_floating_point() and dtype not in _DTYPES]:
            key = dtypes[bad[0]]
            raise ValueError(f"{self._file_of[key]}: {key} is stored as {bad[0]}; {', '.join(_DTYPES)} can be read")
        if conversion is not None:
            self._check_group(conversion, dtypes)
        shape = self.header(key)[1] if conversion is None else conversion.converted_shapes()[name]
        if parameter.shape == shape:
            return
        made = f"{key} has shape {list(shape)}"
        if conversion is not None:
            made = f"{conversion.told} make a tensor of shape {list(shape)}"
        raise ValueError(
            f"{self._file_of[key]}: {made}, the model's {name} {list(parameter.shape)}: config.json and weights do not "
            f"belong together"
        )

    def _check_group(self, conversion: Conversion, dtypes: dict[str, str]) -> None:
        if gaps := conversion.gaps:
            others = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
            raise ValueError(
                f"{self.folder} lacks {gaps[0]}{others}, of which {conversion.first} is made together with "
                f"{conversion.told}; download the model again"
            )
        if len(dtypes) > 1:
            raise ValueError(
                f"{self.folder}: {' and '.join(f'{key} ({dtype})' for dtype, key in sorted(dtypes.items()))} make one "
                f"parameter, {conversion.first}, and have different dtypes; convert them to one"
            )

    def _mapped(self, name: str) -> Tensor:
        """A tensor whose pages are read when they are looked at."""
        try:
            return self._opened(name).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._file_of[name]}: cannot read {name}: {error}") from error

    def _opened(self, name: str) -> safe_open:
        """The file of a tensor, open."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _opened(file)
        return self._open[file]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. `aminmax` propagates NaN and is 40 times faster than `isfinite`."""
    low, high = tensor.aminmax() if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(low.isfinite() and high.isfinite())


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def _quantised_by(config: Any) -> str:
    """The kind of quantisation that a configuration names, and where."""
    values = config if isinstance(config, dict) else config.to_dict()
    return f"quantization_config in config.json: {values.get('quant_method', 'of an unknown kind')}"


def _aliases(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Every name of each tied parameter -> all names of it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}
