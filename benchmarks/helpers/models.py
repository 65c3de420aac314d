"""Models and engines that benchmarks share: the default model, or any shape with random weights, in every method."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.helpers.common import DS_CONFIGS
from sorsa_ds.config.deepspeed_json import read_ds_config, resolve_ds_config
from sorsa_ds.config.schema import (
    AdapterConfig,
    BaselineConfig,
    LoadingConfig,
    ResidualConfig,
    RunConfig,
    SorsaConfig,
    TrainConfig,
)
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.optimizers import adamw
from sorsa_ds.engine.schedules import cosine_with_warmup
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.model.fill import fill_parameters, parameter_homes
from sorsa_ds.model.load import AdaptedModel, AdaptModel, load_adapted_model
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.sharding import Placement, Whole, Zero3
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime import collectives, digest
from sorsa_ds.runtime.device import this_device
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa import residual_storage
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.train.setup import checkpoint_activations

RATE, STEPS_AHEAD = 1e-4, 100
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}  # fmt: skip
"""Settings of ZeRO-3 with which every parameter is gathered for each use, as it is where a model is large for its
GPUs."""


def ds_config(stage: int, precision: str = "mixed", zero: dict | None = None) -> dict:
    """The DeepSpeed settings that the trainer makes of the shipped JSON of a stage.

    zero: settings of `zero_optimization` that replace the shipped ones.
    """
    raw = read_ds_config(DS_CONFIGS / (f"zero{stage}.json" if stage else "stage0.json"))
    raw["zero_optimization"] |= zero or {}
    train = TrainConfig(precision=precision, micro_batch_size=1, global_batch_size=collectives.world_size())
    return resolve_ds_config(raw, train, collectives.world_size(), this_device().type, precision).ds


def default_model(method: str, rank: int, stage: int, precision: str = "mixed", storage: str = "auto") -> AdaptedModel:
    """The default model with the layers of a method; SORSA's factors come from the user's cache of factors."""
    device = this_device()
    return load_adapted_model(
        ensure_embedded_model(lambda text: None), _operation(method, rank, storage, precision),
        loading=LoadingConfig(), placement=_placement(stage, precision), device=device,
    )  # fmt: skip


def shaped_model(
    shape: Path, method: str, rank: int, stage: int, precision: str = "mixed", storage: str = "auto"
) -> PreTrainedModel:
    """A model of a shape with the layers of a method; its random weights are made on this device.

    shape: a folder with a config.json.
    """
    device = this_device()
    model = skeleton(shape, LoadingConfig())
    selection, recipe = _operation(method, rank, storage, precision, cache="off")(model)
    names = {spec.name for target in selection.targets for spec in recipe.specs(Item.of(target))}
    others = {n: getattr(*places[0]).shape for n, places in parameter_homes(model).items() if n not in names}
    fill_parameters(
        model, selection.targets, others, Generated(device), recipe=recipe, placement=_placement(stage, precision),
        device=device, progress=iter,
    )  # fmt: skip
    return model.to(device)  # moves the buffers


def _placement(stage: int, precision: str) -> Placement:
    device = this_device()
    return Zero3(ds_config(3, precision), device) if stage == 3 else Whole(device)


def _operation(method: str, rank: int, storage: str, precision: str, cache: str = "auto") -> AdaptModel:
    device = this_device()
    config = RunConfig(
        method=method, adapter=AdapterConfig(rank=rank), sorsa=SorsaConfig(svd_cache=cache),
        residual=ResidualConfig(storage=storage),
        baseline=BaselineConfig(pissa_iterations=4),  # PEFT's fast PiSSA: its exact one takes minutes at 7B
    )  # fmt: skip
    formats = resolve_precision(precision, None, device.type)
    return method_of(config).operation(
        config, formats, residual_storage.resolve_storage(config.residual, formats, device), device
    )


def engine_of(
    model: torch.nn.Module, stage: int, precision: str = "mixed", sorsa: bool = True, checkpointing: bool = False,
    zero: dict | None = None,
) -> SorsaEngine:  # fmt: skip
    """The trainer's engine around a model.

    sorsa: whether the regulariser is in its step. zero: settings of `zero_optimization` that replace the shipped ones.
    """
    if checkpointing:
        checkpoint_activations(model)
    return engine_with(model, ds_config(stage, precision, zero), sorsa)


def engine_with(model: torch.nn.Module, ds: dict, sorsa: bool = True) -> SorsaEngine:
    """The trainer's engine with given DeepSpeed settings. sorsa: whether the regulariser is in its step."""
    return SorsaEngine(
        model, ds, adamw(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS_AHEAD, 0),
        Regularizer("norm", "mean", 0.2) if sorsa else None, {},
    )  # fmt: skip


def batch_of(length: int, vocabulary: int, device: torch.device, sequences: int = 1) -> dict[str, torch.Tensor]:
    """Sequences of random tokens, all of them learned; each rank has its own.

    vocabulary: number of different tokens.
    """
    generator = torch.Generator().manual_seed(collectives.rank())
    ids = torch.randint(0, vocabulary, (sequences, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Generated:
    """Weights that are made on the device when they are asked for, from their names, so that no file is needed."""

    def __init__(self, device: torch.device):
        self._device = device

    def exchange(self, items: list[Item | None]) -> None:
        """Does nothing: every rank makes all weights itself."""

    def read(self, item: Item) -> tuple[torch.Tensor, None]:
        """Normal random numbers, as large as a trained model's; ones for vectors, which are the norms' weights."""
        if len(item.shape) == 1:
            return torch.ones(item.shape, dtype=torch.bfloat16, device=self._device), None
        seed = int(digest.of_tensor(torch.tensor(list(item.name.encode()))), 16) % 2**31
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.randn(item.shape, generator=generator, device=self._device, dtype=torch.bfloat16) * 0.02, None

    def digest(self, target: Target) -> None:
        """None: the numbers are in no file."""


def peak_gib() -> float | None:
    """The most GiB that PyTorch has had allocated on the GPU; None where there is no GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
