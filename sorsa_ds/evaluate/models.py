"""What `--model` may name: a run, an adapter, a PEFT adapter, a model's folder or a hub name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedModel

from sorsa_ds.config.declare import Name, Rank
from sorsa_ds.config.schema import LoadingConfig, RunConfig
from sorsa_ds.config.typed_json import typed
from sorsa_ds.model import adapter_file, pretrained
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.run.finished import FinishedRun, RunState
from sorsa_ds.run.merge import merge_dense
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.run.reload import reload
from sorsa_ds.runtime import digest, precision
from sorsa_ds.runtime.console import tracked
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.runtime.words import cut

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_AS_TRAINED = {"fp32": torch.float32, "mixed": torch.bfloat16, "bf16": torch.bfloat16}

Load = Callable[[torch.device, torch.dtype | None], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that has been found and not been loaded yet.

    kind: what it is, in words. weights: the files that tell it from other models. tokenizer: folder of its tokenizer.
    load: puts it on a device in a dtype (None: as it was trained), ready to be called. computes: the dtype of products
    where it is loaded as it was trained. autocast: whether such products need torch.autocast. run: the folder and the
    settings of the run that it comes from.
    """

    kind: str
    weights: list[Path]
    tokenizer: Path
    loading: LoadingConfig
    load: Load
    computes: torch.dtype | None = None
    autocast: bool = False
    run: tuple[Path, RunConfig] | None = None

    def digest(self) -> str:
        """Digest of everything that was trained, for which the files are read."""
        return digest.of_bytes(" ".join(digest.of_file(file) for file in self.weights).encode())


def check_model(model: str) -> None:
    """Stop where it shows without reading weights, and without the hub, that a model cannot be evaluated.

    Raises:
        ValueError: there is no such folder, or it is that of an unfinished run.
    """
    pretrained.check_model_name(model)
    folder = Path(model).expanduser()
    if _names_run(folder):
        FinishedRun.open(folder, "--model")


def find_evaluated_model(model: str, base: str | None = None, trust_remote_code: bool = False) -> FoundModel:
    """The model that `--model` names; no weights are read.

    Args:
        base: folder or hub name of the base model, if it is no longer where an adapter says.

    Raises:
        ValueError: there is no such model, or it is an unfinished run.
    """
    check_model(model)
    folder = Path(model).expanduser()
    if _names_run(folder):
        return _run(folder, base)
    if (folder / adapter_file.CONFIG).exists():
        try:
            described = parse_json((folder / adapter_file.CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--model: {folder / adapter_file.CONFIG} is damaged: {error}") from error
        if isinstance(described, dict) and "peft_type" in described:
            return _peft(folder, described, base, trust_remote_code)
        return _adapter(folder, base)
    if base is not None:
        raise ValueError(f"--base goes with a run or an adapter; {model} is neither")
    loading = LoadingConfig(trust_remote_code=trust_remote_code)
    place = find_model(model, loading)
    return FoundModel(
        "model", _weights(place), place, loading, lambda device, dtype: _plain(place, loading, device, dtype)
    )


def _names_run(folder: Path) -> bool:
    """Whether --model names a run. A folder that holds a model's config.json too is taken as that model."""
    return RunState(folder).is_run and not (folder / "config.json").exists()


def _run(folder: Path, base: str | None) -> FoundModel:
    config = RunState(folder).settings()
    adapter_file.read_description(folder / ADAPTER).check_residual(config.residual)
    return _adapter(folder / ADAPTER, base, (folder, config))


def _adapter(folder: Path, base: str | None, run: tuple[Path, RunConfig] | None = None) -> FoundModel:
    """The model of an adapter's folder that training has written: U, s and V, or what another method trains."""
    described = adapter_file.read_description(folder)

    def load(device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
        model = reload(folder, device, lambda rounds: tracked(rounds, len(rounds), "rebuilding", "round"), base).model
        model.eval().requires_grad_(False)
        trained = precision.resolve_precision(described.precision, None, cast(precision.Device, device.type))
        return model if dtype is None else merge_dense(model, described.method, trained, dtype)

    return FoundModel(
        kind="run" if run else "adapter",
        weights=[file for name in (adapter_file.INITIAL, adapter_file.TRAINED) if (file := folder / name).exists()],
        tokenizer=find_model(base or described.base_model, described.loading),
        loading=described.loading,
        load=load,
        computes=_AS_TRAINED[described.precision],
        autocast=described.precision == "mixed",
        run=run,
    )


@dataclass(frozen=True, slots=True)
class _PeftDescription:
    """What is looked at of PEFT's adapter_config.json before PEFT itself reads it.

    rank_pattern: ranks of single layers; with AdaLoRA, which of a layer's ranks are left.
    """

    peft_type: str
    base_model_name_or_path: Name | None = None
    r: Rank | None = None
    init_r: Rank | None = None
    target_r: Rank | None = None
    rank_pattern: dict[str, Rank | Annotated[list[bool], Field(min_length=1)]] | None = None


def _read_peft(folder: Path, found: dict) -> _PeftDescription:
    """The checked description of an adapter in PEFT's format.

    Raises:
        ValueError: PEFT is not installed or does not know the type, or an entry has another type or is out of range.
    """
    try:
        from peft import PeftType
    except ImportError as error:
        raise ValueError(f"--model: {folder} needs the package peft, which is not installed") from error
    try:
        described = typed(_PeftDescription, found)
        if described.peft_type not in PeftType.__members__:
            raise ValueError(f"peft_type: the installed PEFT knows no {cut(described.peft_type)!r}")
    except ValueError as error:
        raise ValueError(f"--model: {folder / PEFT_CONFIG}: not PEFT's description of an adapter ({error})") from error
    return described


def _peft(folder: Path, found: dict, base: str | None, trust_remote_code: bool) -> FoundModel:
    """The model of an adapter in PEFT's format, with its base model."""
    described = _read_peft(folder, found)
    name = base or described.base_model_name_or_path
    if not name:
        raise ValueError(f"--model: {folder / PEFT_CONFIG} names no base model; say it: --base FOLDER")
    if not (folder / PEFT_WEIGHTS).exists():
        raise ValueError(f"--model: {folder} has no {PEFT_WEIGHTS}; other formats are not read")
    loading = LoadingConfig(trust_remote_code=trust_remote_code)
    place = find_model(name, loading)

    def load(device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
        from peft import PeftModel

        model = _plain(place, loading, device, dtype)
        quantised = getattr(model, "hf_quantizer", None) is not None
        try:
            adapted = PeftModel.from_pretrained(model, folder, torch_device=str(device)).eval()
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"--model: PEFT cannot put {folder} on {place}: {error}") from error
        # A PeftModel is no PreTrainedModel, but it passes all calls on to the one that it wraps.
        return cast(PreTrainedModel, adapted if quantised else adapted.merge_and_unload())

    own_tokenizer = (folder / "tokenizer.json").exists()
    return FoundModel(
        "PEFT adapter", [folder / PEFT_WEIGHTS, *_weights(place)], folder if own_tokenizer else place, loading, load
    )


def _plain(folder: Path, loading: LoadingConfig, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model as transformers loads it, which may be a quantised one."""
    attention = None if loading.attn_implementation == "auto" else loading.attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map={"": device},
            attn_implementation=attention,
            trust_remote_code=loading.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"--model: {folder} cannot be loaded as a causal language model: {error}") from error
    return model.eval().requires_grad_(False)


def _weights(folder: Path) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        ValueError: the folder has no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"--model: {os.fspath(folder)} has no weights in safetensors, and is no run either")
    return files
