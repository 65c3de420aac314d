"""The pre-trained weights on disk: find their folder, learn which file holds which parameter, read one at a time."""

from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

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
from sorsa_ds.runtime import digest, hub
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.waiting import first_of_node

_DTYPES = ("F64", "F32", "F16", "BF16")

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
        ValueError: as `find_model`.
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

    def parameter_names(self, model: PreTrainedModel) -> dict[str, str]:
        """Map each parameter and persistent buffer of the model (any alias of tied ones) to its tensor on disk.

        Call it before any linear is replaced. Renamings that transformers knows are followed.

        Raises:
            ValueError: a parameter is missing, has another shape in the files, is quantised, or is stored in a form
                that has to be merged or split (the message names it); or two parameters that are tied are stored with
                different values.
        """
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                f"{self.folder}: its weights are quantised (quantization_config in config.json); take the original "
                f"model, in bf16, fp16 or fp32"
            )
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        meta = model.state_dict()
        stored: dict[str, str] = {}
        merged: list[str] = []
        for key in self._file_of:
            name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
            if converter is not None:
                merged.append(key)
            elif name in meta:
                stored[name] = key
        aliases = _aliases(model)
        missing = [name for name in meta if not any(alias in stored for alias in aliases.get(name, (name,)))]
        if missing:
            why = f" They may be stored merged or split, as {merged[0]!r}, which is not supported." if merged else ""
            raise ValueError(
                f"{self.folder} lacks {len(missing)} parameters of {type(model).__name__}, first "
                f"{', '.join(missing[:3])}.{why}"
            )
        for names in aliases.values():
            sources = sorted({stored[name] for name in names if name in stored})
            if len(sources) > 1 and len({digest.of_tensor(self.read(source)) for source in sources}) > 1:
                raise ValueError(
                    f"{self.folder}: {' and '.join(sources)} are tied by config.json (tie_word_embeddings) but stored "
                    f"with different values; set tie_word_embeddings to false there, or remove the one not meant"
                )
            stored.update(dict.fromkeys(names, sources[0]))
        for name, key in stored.items():
            self._check_form(name, key, meta[name])
        return stored

    def _check_form(self, name: str, key: str, parameter: Tensor) -> None:
        dtype, shape = self.header(key)
        if parameter.shape != shape:
            raise ValueError(
                f"{self._file_of[key]}: {key} has shape {list(shape)}, the model's {name} {list(parameter.shape)}: "
                f"config.json and weights do not belong together"
            )
        if parameter.is_floating_point() and dtype not in _DTYPES:
            raise ValueError(f"{self._file_of[key]}: {key} is stored as {dtype}; {', '.join(_DTYPES)} can be read")

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


def _aliases(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Every name of each tied parameter -> all names of it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}
