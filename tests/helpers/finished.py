"""Finished runs of small models, made without the trainer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sorsa_ds.config.method_settings import MethodName
from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.methods.registry import METHODS
from sorsa_ds.model import adapter_file
from sorsa_ds.model.load import load_adapted_model
from sorsa_ds.model.sharding import Whole
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa import residual_storage
from tests.helpers.architectures import exactly
from tests.helpers.sorsa_models import load_sorsa_model

CPU = torch.device("cpu")
REPORT = {"steps": 7, "loss_first": 2.5, "loss_last": 1.25, "eval_loss_start": 2.0, "eval_loss_end": 1.125,
          "reg_loss_end": 0.01, "trainable_parameters": 1234, "versions": {"torch": "2"}}  # fmt: skip


def finished_run(
    base: Path, folder: Path, precision="fp32", size=0.1, storage="auto", numerics: dict | None = None, **adapter
) -> Path:
    """The folder of a run that has moved every factor by about `size`, made without the trainer."""
    formats = resolve_precision(precision, None, "cpu")
    config = RunConfig(
        model=str(base), adapter=AdapterConfig(**{"rank": 4, **adapter}),
        residual=residual_storage.resolve_residual(ResidualConfig(storage=storage), formats),
        train=TrainConfig(precision=precision, learning_rate=1e-3, global_batch_size=8),
    )  # fmt: skip
    initial, trained = {}, {}
    generator = torch.Generator().manual_seed(0)

    def source(target, weight, digest=None):
        found = exactly(target, weight)
        for leaf in ("U", "s", "V"):
            factor = getattr(found, leaf)
            noise = torch.randn(factor.shape, generator=generator)
            initial[f"{target.name}.{leaf}"] = factor
            trained[f"{target.name}.{leaf}"] = factor + size * factor.std(correction=0) * noise
        return found

    loaded = load_sorsa_model(
        base, adapter=config.adapter, precision=formats, placement=Whole(CPU), device=CPU,
        factor_source=source, storage=residual_storage.resolve_storage(config.residual, formats, CPU),
    )  # fmt: skip
    (folder / "adapter").mkdir(parents=True)
    save_file(initial, folder / "adapter" / adapter_file.INITIAL)
    save_file(trained, folder / "adapter" / adapter_file.TRAINED)
    adapter_file.describe_adapter(folder / "adapter", config, loaded.targets, loaded.digests, numerics)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


def finished_whole_run(
    base: Path, folder: Path, method: MethodName, precision="fp32", size=0.1, **adapter
) -> tuple[Path, PreTrainedModel]:
    """The folder of a run of whole weights that has moved each by about `size`, made without the trainer, and what the
    run leaves in memory: the trained model in the run's precision."""
    formats = resolve_precision(precision, None, "cpu")
    config = RunConfig(
        model=str(base), method=method, adapter=AdapterConfig(**adapter),
        residual=residual_storage.resolve_residual(ResidualConfig(), formats),
        train=TrainConfig(precision=precision, learning_rate=1e-3, global_batch_size=8),
    )  # fmt: skip
    storage = residual_storage.resolve_storage(config.residual, formats, CPU)
    loaded = load_adapted_model(
        base, METHODS[method].operation(config, formats, storage, CPU), loading=config.loading, placement=Whole(CPU),
        device=CPU, dtype=formats.residual_dtype,
    )  # fmt: skip
    generator, trained = torch.Generator().manual_seed(0), {}
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            moved = parameter.detach().float() + size * parameter.detach().float().std(correction=0) * noise
            trained[name] = moved
            parameter.data = moved.to(parameter.dtype)
    (folder / "adapter").mkdir(parents=True)
    save_file(trained, folder / "adapter" / adapter_file.TRAINED)
    adapter_file.describe_adapter(folder / "adapter", config, loaded.targets, loaded.digests)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder, loaded.model


def base_of(run: Path) -> Path:
    """The folder of a run's base model."""
    return Path(adapter_file.read_description(run / "adapter").base_model)
