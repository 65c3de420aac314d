"""The adapter on disk: the trained tensors (with SORSA U, s and V) as training left them and as it began with them.

The initial factors make the frozen residual reproducible from the base model alone, W_r = W - U_0 diag(s_0) V_0^T
(quantised again where it was quantised), without another decomposition. Both files hold fp32 tensors under the names of
the model's parameters: `<layer>.U`, `<layer>.s`, `<layer>.V`. The methods that train whole weights keep no initial
tensors, because theirs are the base model's own.

PEFT's adapter_config.json and adapter_model.safetensors may lie in the same folder (`sorsa_ds.run.peft_files`). Version
0.1.0 wrote what is here under these two names; `file_of` finds either.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sorsa_ds.config.declare import Digest, Name, NonNegativeInt, PositiveInt
from sorsa_ds.config.renamed import renamed_sections
from sorsa_ds.config.schema import (
    AdapterConfig,
    BaselineConfig,
    LoadingConfig,
    MethodName,
    ResidualConfig,
    RunConfig,
    SorsaConfig,
)
from sorsa_ds.config.typed_json import typed
from sorsa_ds.model import peft_names
from sorsa_ds.model.model_files import OWN_ADAPTER_CONFIG
from sorsa_ds.model.pretrained import all_finite
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.runtime.precision import Name as PrecisionName

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRAINED, INITIAL, CONFIG = "trained_factors.safetensors", "initial_factors.safetensors", OWN_ADAPTER_CONFIG
EARLIER = {TRAINED: peft_names.WEIGHTS, CONFIG: peft_names.CONFIG}
"""What version 0.1.0 called two of the files."""


@dataclass(frozen=True, slots=True)
class Description:
    """What sorsa_config.json holds: all that is needed to put the trained tensors back into the base model.

    base_model: folder or hub name.
    precision: the precision of training; the residual depends on how the factors are rounded.
    layers: every adapted linear -> its out, in and rank; where it is the weight of experts, their number too.
    digests: the digest of every parameter of the base model, by its name (`sorsa_ds.runtime.digest`).
    residual: how the residual was kept to which U, s and V belong.
    files: digests of the files of tensors; empty until training has ended.
    method, baseline: the method of fine-tuning, and the settings that only the baselines have.
    numerics: what decides the base model's numbers besides its weights (`model.numerics`); empty in older files.
    new_tokens: tokens that training has added to the base model's tokenizer -> their ids.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    base_model: Name
    loading: LoadingConfig
    precision: PrecisionName
    adapter: AdapterConfig
    layers: dict[str, dict[str, PositiveInt]]
    digests: dict[str, Digest]
    sorsa: SorsaConfig = field(default_factory=SorsaConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    files: dict[str, Digest] = field(default_factory=dict)
    method: MethodName = "sorsa"
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    numerics: dict[str, Any] = field(default_factory=dict)
    new_tokens: dict[str, NonNegativeInt] = field(default_factory=dict)

    def unchecked(self, files: Iterable[str], parameters: Iterable[str]) -> str | None:
        """A sentence on what has no digest here, so that nobody takes it for checked; None where nothing lacks one.

        Args:
            files: names of the files of tensors that are read.
            parameters: names of the base model's parameters.
        """
        parameters = list(parameters)
        lacking = [name for name in files if name not in self.files]
        if unknown := sum(name not in self.digests for name in parameters):
            lacking.append(f"{unknown} of {len(parameters)} parameters of the base model")
        if not lacking:
            return None
        return f"the adapter has no digest of {', '.join(lacking)}: whether they are those of training is not checked."

    def check_residual(self, wanted: ResidualConfig) -> None:
        """Stop where U, s and V would be put on a residual that is not kept as it was in training.

        Raises:
            ValueError: the storage or the block size differs; the message names both.
        """
        ours, theirs = ((config.storage, config.block_size) for config in (self.residual, wanted))
        if ours != theirs:
            raise ValueError(
                f"the adapter was trained over a residual in {ours[0]} (blocks of {ours[1]}), but the settings say "
                f"{theirs[0]} (blocks of {theirs[1]}): the adapter and the run's settings do not belong together"
            )


def describe_adapter(
    folder: Path,
    config: RunConfig,
    targets: list[Target],
    digests: dict[str, str],
    numerics: dict[str, Any] | None = None,
    new_tokens: dict[str, int] | None = None,
) -> None:
    """Write the description of a run's adapter; `train.precision` and `residual.storage` must be resolved.

    Args:
        digests: the digest of every parameter of the base model, by its name.
        numerics: what decides the base model's numbers besides its weights (`model.numerics`); None: not known.
        new_tokens: the ids of `data.new_tokens`.
    """
    assert config.train.precision != "auto", "the settings are resolved"
    layers = {target.name: target.layout for target in targets}
    description = Description(
        config.model, config.loading, config.train.precision, config.adapter, layers, digests,
        sorsa=config.sorsa, residual=config.residual, method=config.method, baseline=config.baseline,
        numerics=numerics or {}, new_tokens=new_tokens or {},
    )  # fmt: skip
    write_description(folder, description)


def file_of(folder: Path, name: str) -> Path:
    """The path of a file of an adapter, under the name that the version which wrote the adapter gave it.

    Args:
        name: `CONFIG`, `TRAINED` or `INITIAL`.
    """
    is_earlier = not (folder / CONFIG).exists() and (folder / EARLIER[CONFIG]).exists()
    return folder / (EARLIER.get(name, name) if is_earlier else name)


def record_digests(folder: Path) -> None:
    """Write the digests of a finished adapter's files into its description."""
    files = {name: digest.of_file(folder / name) for name in (INITIAL, TRAINED) if (folder / name).exists()}
    described = read_description(folder, trust_remote_code=True)  # the run's own; nothing is loaded
    write_description(folder, replace(described, files=files))


def open_factors(folder: Path, name: str, described: Description) -> "FactorFile":
    """Open the file `INITIAL` or `TRAINED` of an adapter, after a check against its digest.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = FactorFile(file_of(folder, name))
    if name in described.files and digest.of_file(file.path) != described.files[name]:
        raise ValueError(f"{file.path} is damaged: its digest is not the one that was written down")
    return file


def write_description(folder: Path, description: Description) -> None:
    """Write sorsa_config.json."""
    write_json(folder / CONFIG, asdict(description))


def read_description(folder: Path, trust_remote_code: bool = False) -> Description:
    """Read sorsa_config.json, or what version 0.1.0 called adapter_config.json.

    Args:
        trust_remote_code: whether the caller allows Python code that comes with the base model. A description may ask
            for such code, and cannot allow it: an adapter may be anybody's.

    Raises:
        ValueError: the file is missing, broken, or not such a description (the message names the file and the entry),
            or it asks for code that the caller has not allowed.
    """
    path = file_of(folder, CONFIG)
    try:
        found = typed(Description, _completed(parse_json(path.read_text(encoding="utf-8"))))
        for name, layer in found.layers.items():
            _check_layer(name, layer)
        if unknown := found.files.keys() - {TRAINED, INITIAL}:
            raise ValueError(f"files: {', '.join(sorted(unknown))} is no file of an adapter")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not the description of an adapter of this program ({error})") from error
    if found.loading.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"{path} asks to run Python code that comes with the base model {found.base_model!r} "
            f"(loading.trust_remote_code), which only you can allow: if you trust that model's author, add "
            f"--trust_remote_code (in Python: load_adapter(..., trust_remote_code=True))"
        )
    return found


def _completed(described: Any) -> Any:
    """A description as this version writes it: settings and files under their names of now, and nothing lacking.

    The first versions left experts that are one parameter as they were.
    """
    if not isinstance(described, dict):
        return described
    found = renamed_sections(described)
    if isinstance(adapter := found.get("adapter"), dict):
        adapter.setdefault("experts", "frozen")
    if isinstance(files := found.get("files"), dict) and EARLIER[TRAINED] in files:
        files[TRAINED] = files.pop(EARLIER[TRAINED])
    return found


def _check_layer(name: str, layer: dict[str, int]) -> None:
    """Stop where a layer has other entries than its shape and rank, or a rank that its shape cannot have.

    Raises:
        ValueError: naming the layer.
    """
    if layer.keys() - {"experts"} != {"out", "in", "rank"}:
        raise ValueError(f"layers.{name}: has {', '.join(layer) or 'nothing'} instead of out, in and rank")
    if layer["rank"] > min(layer["out"], layer["in"]):
        raise ValueError(f"layers.{name}: rank {layer['rank']} exceeds min(out, in)")


class FactorFile:
    """The tensors of one file of an adapter, which lies at `path`.

    Raises:
        ValueError: the file is missing, damaged or truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        self._opened()

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the file."""
        return list(self._opened().keys())

    def values(self, name: str, shape: torch.Size) -> Tensor:
        """Read one tensor of this shape, on the CPU.

        Raises:
            ValueError: the file lacks the tensor, or has it in another shape.
        """
        tensor = self.tensor(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{self.path}: {name} has other shapes than in this model ({list(tensor.shape)}, not {list(shape)}): "
                f"wrong base model or rank"
            )
        return tensor

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, in fp32.

        Raises:
            ValueError: the file has no tensor of that name, it cannot be read, it is not of floating-point numbers, or
                one of them is NaN or infinite.
        """
        file = self._opened()  # opened each time: an open file keeps every page resident that was ever read
        try:
            stored = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: has no {name}; is it the adapter of another model?") from error
        if stored.dtype not in _FLOATS:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ValueError(f"{self.path}: {name} is stored as {kind}, and what was trained is floating-point")
        tensor = stored.float()
        if not all_finite(tensor):
            raise ValueError(f"{self.path}: {name} holds NaN or Inf (as fp32)")
        return tensor

    def _opened(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: missing, truncated or not a safetensors file ({error})") from error
