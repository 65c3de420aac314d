"""What `--model` may name: a run, an adapter, a PEFT adapter, a model's folder or a hub name."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from sorsa_ds.config.schema import EMBEDDED_MODEL, LoadingConfig, RunConfig
from sorsa_ds.evaluate import peft_adapter
from sorsa_ds.evaluate.backends.placement import check_fits, place, weight_bytes
from sorsa_ds.model import adapter_file
from sorsa_ds.model.language_part import model_class, most_positions
from sorsa_ds.model.model_files import check_model_name
from sorsa_ds.model.numerics import check_numerics
from sorsa_ds.model.pretrained import find_folder, find_model
from sorsa_ds.model.skeleton import attention_of, read_config
from sorsa_ds.run.checkpoint.named import named_checkpoint
from sorsa_ds.run.checkpoint.trained import trained_files, trained_values
from sorsa_ds.run.finished import FinishedRun, RunState, near_runs
from sorsa_ds.run.merge import merge_dense
from sorsa_ds.run.paths import ADAPTER, CHAT_TEMPLATE, TOKENIZER
from sorsa_ds.run.reload import reload
from sorsa_ds.run.ways_on import merging
from sorsa_ds.runtime import digest, precision
from sorsa_ds.runtime.console import say, tracked
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.sorsa.residual_storage import Storage, storage_of, stored_bytes

_AS_TRAINED = {"fp32": torch.float32, "mixed": torch.bfloat16, "bf16": torch.bfloat16}

Load = Callable[[torch.device, torch.dtype | None], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that has been found and not been loaded yet.

    kind: what the model is, in words.
    weights: the files that tell the model from others.
    folder: the folder of the model, or of the base model under an adapter.
    tokenizer: the folder of the tokenizer.
    loading: how the model and its tokenizer are read.
    load: puts the model on a device in a dtype (None: as it was trained), ready to be called.
    computes: the dtype of matrix products where the model is loaded as it was trained.
    autocast: whether such products need torch.autocast.
    run: the folder and the settings of the run that the model comes from.
    checkpoint: the run's checkpoint that was found; None: the run's end.
    chat_template: the file with the chat template of training, where that was not the tokenizer's own.
    """

    kind: str
    weights: list[Path]
    folder: Path
    tokenizer: Path
    loading: LoadingConfig
    load: Load
    computes: torch.dtype | None = None
    autocast: bool = False
    run: tuple[Path, RunConfig] | None = None
    checkpoint: Path | None = None
    chat_template: Path | None = None

    def digest(self) -> str:
        """Digest of everything that was trained, for which the files are read."""
        return digest.of_bytes(" ".join(digest.of_file(file) for file in self.weights).encode())

    def positions(self) -> int | None:
        """The most tokens that the model takes; None where that is not limited."""
        return most_positions(read_config(self.folder, self.loading))


def check_model(model: str, checkpoint: str | None = None) -> None:
    """Stop where it shows without reading weights, and without the hub, that a model cannot be evaluated.

    Args:
        checkpoint: which checkpoint of a run: `best`, `latest`, a number of steps or its folder's name. With one, the
            run may be unfinished. None: the run's end.

    Raises:
        ValueError: there is no such folder or checkpoint, or it is that of an unfinished run.
    """
    check_model_name(model)
    folder = Path(model).expanduser()
    if checkpoint is not None:
        if not _names_run(folder):
            raise ValueError(f"--checkpoint goes with the folder of a run; {model} is none")
        named_checkpoint(folder, checkpoint, "--checkpoint")
    elif _names_run(folder):
        FinishedRun.open(folder, "--model")


def find_evaluated_model(
    model: str,
    base: str | None = None,
    trust_remote_code: bool = False,
    checkpoint: str | None = None,
    against_base: bool = False,
) -> FoundModel:
    """The model that `--model` names; no weights are read.

    Args:
        checkpoint: which checkpoint of a run; None: the run's end (see `check_model`).
        base: folder or hub name of the base model, if it is no longer where an adapter says.
        against_base: `base` may also name what a plain model was trained from, for `base_of`.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        ValueError: there is no such model, it is an unfinished run, or it needs code that is not allowed.
    """
    check_model(model, checkpoint)
    folder = Path(model).expanduser()
    if _names_run(folder):
        return _run(folder, base, trust_remote_code, checkpoint)
    loading = LoadingConfig(trust_remote_code=trust_remote_code)
    if model != EMBEDDED_MODEL:
        try:
            folder = find_folder(model, loading)  # what the hub gives may be an adapter too
        except ValueError as error:
            raise ValueError(f"{error}{near_runs(folder)}") from error
    if (folder / adapter_file.CONFIG).exists():
        return _adapter(folder, base, trust_remote_code)
    if (folder / peft_adapter.CONFIG).exists():
        described = _json_object(folder / peft_adapter.CONFIG)
        if "peft_type" in described:
            return _peft(folder, described, base, loading)
        return _adapter(folder, base, trust_remote_code)  # version 0.1.0 gave its own description that name
    if base is not None and not against_base:
        raise ValueError(f"--base goes with a run or an adapter; {model} is neither")
    return _model(find_model(model, loading), loading)


def base_of(found: FoundModel, model: str, base: str | None) -> tuple[str, FoundModel]:
    """The base model of a model, and its name; no weights are read.

    An adapter says which one it is. A plain model, such as a merged export, has it named by the user or by its card.

    Args:
        found: what `find_evaluated_model` gives for `model`, with this `base`.

    Raises:
        ValueError: no base model is known for a plain model, or the base model is not found.
    """
    if found.kind != "model":
        return str(found.folder), _model(found.folder, found.loading)
    name = base or _base_on_card(found.folder)
    if name is None:
        raise ValueError(
            f"--base is missing: {model} is a plain model that does not say what it was trained from; name that model: "
            f"--base MODEL (a folder or hub name)"
        )
    if base is None:
        say(f"The card of {model} names {name} as what it was trained from (--base names another one).")
    loading = replace(found.loading, revision=None)
    return name, _model(find_model(name, loading), loading)


def _base_on_card(folder: Path) -> str | None:
    """The one base model that the card of a model's folder names, as `base_model`; None where it names none."""
    try:
        named = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.base_model
    except (OSError, ValueError, yaml.YAMLError):  # there is no card, or none that can be read
        return None
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return names[0] if len(names) == 1 and isinstance(names[0], str) and names[0] else None


def _model(place: Path, loading: LoadingConfig) -> FoundModel:
    """The model in a folder in the format of transformers."""
    return FoundModel(
        "model", _weights(place), place, place, loading, lambda device, dtype: _plain(place, loading, device, dtype)
    )


def _json_object(path: Path) -> dict:
    """The content of a description.

    Raises:
        ValueError: the file cannot be read, or is no JSON object.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: {path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--model: {path} is damaged: {type(found).__name__} where an object is needed")
    return found


def _names_run(folder: Path) -> bool:
    """Whether --model names a run. A folder that holds a model's config.json too is taken as that model."""
    return RunState(folder).is_run and not (folder / "config.json").exists()


def _run(folder: Path, base: str | None, trust_remote_code: bool, checkpoint: str | None) -> FoundModel:
    config = RunState(folder).settings()
    adapter_file.read_description(folder / ADAPTER, trust_remote_code).check_residual(config.residual)
    saved = None if checkpoint is None else named_checkpoint(folder, checkpoint, "--checkpoint")
    return _adapter(folder / ADAPTER, base, trust_remote_code, (folder, config), saved)


def _adapter(
    folder: Path,
    base: str | None,
    trust_remote_code: bool,
    run: tuple[Path, RunConfig] | None = None,
    checkpoint: Path | None = None,
) -> FoundModel:
    """The model of an adapter's folder that training has written: U, s and V, or what another method trains.

    Args:
        checkpoint: has what was trained in place of the folder; None: the folder.
    """
    described = adapter_file.read_description(folder, trust_remote_code)
    place = find_model(base or described.base_model, described.loading)
    check_numerics(described.numerics, place, described.loading, say)
    way_on = merging(run[0]) if run else "launch/export.py --format merged, with the folder of the adapter's run"

    def load(device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
        trained = precision.resolve_precision(described.precision, None, cast(precision.Device, device.type))
        storage = storage_of(described.residual, trained)
        held = dtype or trained.residual_dtype
        linears = [layer for layer, shape in described.layers.items() if "experts" not in shape]
        needed = weight_bytes(place, held, {f"{layer}.weight": storage for layer in linears} if dtype is None else {})
        if dtype is None:
            needed -= sum(_packed_away(shape, storage, held) for shape in described.layers.values())
        check_fits(needed, device, way_on)
        rebuilt = reload(
            folder,
            device,
            lambda rounds: tracked(rounds, len(rounds), "rebuilding", "round"),
            base,
            trust_remote_code,
            None if checkpoint is None else trained_values(checkpoint),
        )
        model = rebuilt.model.eval().requires_grad_(False)
        return model if dtype is None else merge_dense(model, described.method, trained, dtype)

    trained = [adapter_file.file_of(folder, adapter_file.TRAINED)] if checkpoint is None else trained_files(checkpoint)
    files = [adapter_file.file_of(folder, adapter_file.INITIAL), *trained]
    return FoundModel(
        kind="run" if run else "adapter",
        weights=[file for file in files if file.exists()],
        folder=place,
        tokenizer=own if (own := folder / TOKENIZER).exists() else place,
        loading=described.loading,
        load=load,
        computes=_AS_TRAINED[described.precision],
        autocast=described.precision == "mixed",
        run=run,
        checkpoint=checkpoint,
        chat_template=kept if (kept := folder / CHAT_TEMPLATE).exists() else None,
    )


def _packed_away(layer: dict[str, int], storage: Storage, dtype: torch.dtype) -> int:
    """The bytes that experts need less than in `dtype`, however the base model stores them; 0 for a linear.

    Args:
        layer: its shape, as the description of an adapter has it.
    """
    shape = torch.Size((layer["out"], layer["in"]))
    return layer.get("experts", 0) * (shape.numel() * dtype.itemsize - stored_bytes(storage, shape))


def _peft(folder: Path, described: dict, base: str | None, loading: LoadingConfig) -> FoundModel:
    """The model of an adapter in PEFT's format, with its base model."""
    name = peft_adapter.base_model_of(folder, described, base)
    revision = None if base else described.get("revision")
    loading = replace(loading, revision=revision if isinstance(revision, str) else None)
    place = find_model(name, loading)

    def load(device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
        return peft_adapter.put_on(_plain(place, loading, device, dtype), folder, described, device)

    own_tokenizer = (folder / "tokenizer.json").exists()
    return FoundModel(
        "PEFT adapter",
        [folder / peft_adapter.WEIGHTS, *_weights(place)],
        place,
        folder if own_tokenizer else place,
        loading,
        load,
    )


def _plain(folder: Path, loading: LoadingConfig, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model as transformers loads it, which may be a quantised one."""
    config, attention = read_config(folder, loading), attention_of(loading)
    placement = place(folder, dtype, device)
    if placement.told:
        say(placement.told)
    try:
        model = model_class(config).from_pretrained(
            folder,
            dtype=dtype or "auto",
            **placement.arguments,
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
