"""The adapter on disk: U, s and V as trained, and as they began.

The initial factors make the frozen residual reproducible from the base model alone, W_r = W - U_0 diag(s_0) V_0^T,
without another decomposition. Both files hold fp32 tensors named `<layer>.U`, `<layer>.s`, `<layer>.V`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds import comm
from sorsa_ds.config import RunConfig
from sorsa_ds.decompose import Factors
from sorsa_ds.engine import SorsaEngine
from sorsa_ds.files import write_atomic, write_json
from sorsa_ds.loading import FactorSource, Loaded
from sorsa_ds.surgery import Target

TRAINED, INITIAL, CONFIG = "adapter_model.safetensors", "initial_factors.safetensors", "adapter_config.json"


def save_factors(engine: SorsaEngine, path: Path) -> None:
    """Gather the fp32 masters tensor by tensor to rank 0, which writes them, and reads them back. A collective call.

    Raises:
        ValueError: on every rank, if rank 0 could not write or finds something else on the disk than it wrote.
    """
    mine = {fragment.name: fragment for fragment in engine.masters.fragments}
    whole: dict[str, Tensor] = {}
    for name, shape in engine.trained_shapes.items():
        tensor = engine.masters.full(name, shape, mine.get(name), engine.device)
        if comm.rank() == 0:
            whole[name] = tensor.cpu()
    error = None
    if comm.rank() == 0:
        try:
            write_atomic(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
            _check_written(path, whole)
        except Exception as caught:
            error = caught
    comm.agree(error, engine.device)


def save_config(folder: Path, config: RunConfig, targets: list[Target]) -> None:
    """Write what a reader needs to put the factors back: the base model, the settings, every layer's shape.

    `config.train.precision` must be resolved: the residual depends on how the factors are rounded.
    """
    layers = {t.name: {"out": t.out_features, "in": t.in_features, "rank": t.rank} for t in targets}
    settings = {
        "method": "sorsa",
        "base_model": config.model,
        "precision": config.train.precision,
        "sorsa": asdict(config.sorsa),
        "layers": layers,
    }
    write_json(folder / CONFIG, settings)


def initial_factors(folder: Path) -> FactorSource:
    """A factor source that reads a finished run's initial factors instead of decomposing.

    Raises:
        ValueError: no such file, or, when it is asked, a layer that the file lacks or has in another shape.
    """
    path = folder / INITIAL
    file = _open(path)

    def read(target: Target, weight: Tensor) -> Factors:
        U, s, V = (_tensor(file, path, f"{target.name}.{leaf}").to(weight.device) for leaf in ("U", "s", "V"))
        expected = ((target.out_features, target.rank), (target.rank,), (target.in_features, target.rank))
        if (U.shape, s.shape, V.shape) != expected:
            raise ValueError(f"{path}: {target.name} has other shapes than in this model: wrong base model or rank")
        return Factors(U, s, V)

    return read


@torch.no_grad()
def load_trained(loaded: Loaded, folder: Path) -> None:
    """Overwrite U, s and V of a whole (not sharded) model with the trained ones.

    Raises:
        ValueError: a file or a tensor is missing or damaged.
    """
    path = folder / TRAINED
    file = _open(path)
    for target in loaded.targets:
        layer = loaded.model.get_submodule(target.name)
        for leaf in ("U", "s", "V"):
            getattr(layer, leaf).copy_(_tensor(file, path, f"{target.name}.{leaf}"))


def read_config(folder: Path) -> dict:
    """The adapter's own description.

    Raises:
        ValueError: it is missing or broken.
    """
    path = folder / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not an adapter's description ({error})") from error


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: missing, truncated or not a safetensors file ({error})") from error


def _tensor(file, path: Path, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: has no {name}; is it the adapter of another model?") from error


def _check_written(path: Path, whole: dict[str, Tensor]) -> None:
    file = _open(path)
    for name, tensor in whole.items():
        if not torch.equal(_tensor(file, path, name), tensor):
            raise ValueError(f"{path}: {name} reads back differently from what was written; check the disk")
