"""What is exported: a finished run, its adapter, and its base model; refused where they do not belong together."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.config import command_line
from sorsa_ds.config.schema import EMBEDDED_MODEL, RunConfig
from sorsa_ds.methods import keeps_initial
from sorsa_ds.methods.peft_layers import PeftLayers
from sorsa_ds.model import adapter_file
from sorsa_ds.model.adapter_file import Description, FactorFile
from sorsa_ds.model.factor_source import from_values
from sorsa_ds.model.pretrained import Checkpoint, find_model
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import Target, select
from sorsa_ds.model.weight_sources import OnDisk
from sorsa_ds.run.paths import ADAPTER, CONFIG, REPORT
from sorsa_ds.runtime import precision
from sorsa_ds.runtime.folder_lock import is_held
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import residual_storage
from sorsa_ds.sorsa.decompose import Factors
from sorsa_ds.sorsa.residual_storage import Storage

Progress = Callable[[list[str]], Iterable[str]]
"""Wraps the names of the tensors that are worked on, to show how far it is."""


@dataclass(frozen=True, slots=True)
class Source:
    """A finished run.

    report: what the run itself measured. described: its adapter; `base_model` is the one that the export is for.
    model: the base model without memory for its parameters. weights: the base model's, on disk. storage: how the
    residual was kept. initial: None where whole weights were trained.
    """

    config: RunConfig
    report: dict
    adapter: Path
    described: Description
    model: PreTrainedModel
    weights: OnDisk
    targets: list[Target]
    precision: Precision
    storage: Storage
    initial: FactorFile | None
    trained: FactorFile

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self.weights.checkpoint.folder

    @property
    def from_hub(self) -> bool:
        """Whether the base model's name is one on the hub, which means something elsewhere too."""
        return self.described.base_model != EMBEDDED_MODEL and not Path(self.described.base_model).is_dir()

    @property
    def changed(self) -> dict[str, Target | None]:
        """The base model's parameters that training has changed -> the linear whose weight it is; None with `full`."""
        if self.described.method == "full":
            return dict.fromkeys(self.trained.names)
        return {f"{target.name}.weight": target for target in self.targets}

    @property
    def peft(self) -> PeftLayers:
        """PEFT's layers, as they were in training."""
        return PeftLayers(self.described.method, self.described.sorsa, self.described.baseline)

    def factors(self, target: Target, weight: Tensor) -> tuple[Factors, Factors]:
        """A target's (initial, trained) factors, of SORSA."""
        initial, trained = (from_values(file.values)(target, weight) for file in (self.initial, self.trained))
        return initial, trained


def open_run(run: Path, base: str | None = None) -> Source:
    """The run of a folder; weights are not read yet.

    Args:
        base: folder or hub name of the base model, where it is no longer the one that the run names.

    Raises:
        ValueError: it is no run, still trains, is unfinished or damaged, or the base model has other layers.
    """
    if not (run / CONFIG).exists():
        raise ValueError(f"--run: {run} is not the folder of a run: it has no {CONFIG}")
    if is_held(run):
        raise ValueError(f"--run: {run} still trains; come back when it is done")
    if not (run / REPORT).exists():
        raise ValueError(
            f"--run: {run} is unfinished: it has no {REPORT}; go on with it (launch/train.py --resume {run})"
        )
    try:
        report = json.loads((run / REPORT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--run: {run / REPORT} is damaged: {error}") from error
    folder = run / ADAPTER
    described = adapter_file.read_description(folder)
    config = command_line.load_settings(RunConfig, run / CONFIG)
    described.check_residual(config.residual)
    if base is not None:
        place = Path(base).expanduser()
        described = replace(described, base_model=str(place.resolve()) if place.exists() else base)
    try:
        base_folder = find_model(described.base_model, described.loading)
    except ValueError as error:
        raise ValueError(f"{error}; say where the base model is: --base FOLDER") from error
    model = skeleton(base_folder, described.loading)
    checkpoint = Checkpoint(base_folder)
    weights = OnDisk(checkpoint, checkpoint.parameter_names(model), described.digests)
    targets = [] if described.method == "full" else select(model, described.sorsa)
    _check_layers(base_folder, targets, described)
    formats = precision.resolve_precision(described.precision, None, "cpu")
    return Source(
        config,
        report,
        folder,
        described,
        model,
        weights,
        targets,
        formats,
        residual_storage.resolve_storage(described.residual, formats, torch.device("cpu")),
        adapter_file.open_factors(folder, adapter_file.INITIAL, described) if keeps_initial(described.method) else None,
        adapter_file.open_factors(folder, adapter_file.TRAINED, described),
    )


def check(source: Source, progress: Progress) -> None:
    """Read the base model and the factors once, and compare every parameter's digest with that of training.

    Raises:
        ValueError: naming the first parameter that differs or cannot be read, or whose factors have other shapes.
    """
    digests, weights = source.described.digests, source.weights
    for name in source.changed:
        if name not in digests:
            raise ValueError(
                f"{source.adapter / adapter_file.CONFIG}: has no digest of {name}: not the adapter of this base"
            )
    for name in progress(list(digests)):
        if name not in weights.stored:
            raise ValueError(f"{source.base}: has no {name}: not the base model that was trained on")
        weight = weights.parameter(name)
        if source.described.method == "sorsa" and (target := source.changed.get(name)):
            source.factors(target, weight)


def _check_layers(base: Path, targets: list[Target], described: Description) -> None:
    found = {t.name: {"out": t.out_features, "in": t.in_features, "rank": t.rank} for t in targets}
    for name in [*described.layers, *found]:
        has, wants = found.get(name, "absent"), described.layers.get(name, "absent")
        if has != wants:
            raise ValueError(f"{base} does not fit the adapter: {name} is {has} here, {wants} there: wrong base model")
