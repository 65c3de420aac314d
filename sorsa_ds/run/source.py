"""What is exported or analysed: a run, its adapter and its base model, if they belong together."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sorsa_ds.config.schema import EMBEDDED_MODEL, RunConfig
from sorsa_ds.methods.method import Method
from sorsa_ds.methods.registry import METHODS, method_of
from sorsa_ds.model import adapter_file
from sorsa_ds.model.adapter_file import CONFIG, Description, FactorFile, file_of
from sorsa_ds.model.new_tokens import grow_tables, rows_for
from sorsa_ds.model.numerics import check_numerics
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.weight_sources import DiskWeightSource
from sorsa_ds.model.whole_modules import WholeParameter
from sorsa_ds.run.finished import FinishedRun, RunState
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.runtime import precision
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import residual_storage
from sorsa_ds.sorsa.residual_storage import Storage

TensorProgress = Callable[[list[str]], Iterable[str]]
"""Wraps the names of the tensors that are worked on, to show how much of the work is done."""


@dataclass(frozen=True, slots=True)
class Source:
    """All parts of a run that has trained something.

    report: what the run itself measured.
    adapter: the folder of what was trained.
    described: the adapter's description; its `base_model` is the one that was found, perhaps in another place.
    trust_remote_code: whether the caller allows Python code that comes with the base model.
    model: the base model without memory for its parameters, with the rows that new tokens have got.
    weights: the base model's weights on disk.
    targets: the adapted linears, in module order; none where every parameter was trained.
    whole: the parameters that were trained whole beside the adapters, in module order.
    precision: the number formats of training.
    storage: how training stored the residuals.
    initial: the trained tensors as training began; None where that is the base model itself.
    trained: the trained tensors as training left them.
    """

    config: RunConfig
    report: dict
    adapter: Path
    described: Description
    trust_remote_code: bool
    model: PreTrainedModel
    weights: DiskWeightSource
    targets: list[Target]
    whole: list[WholeParameter]
    precision: Precision
    storage: Storage
    initial: FactorFile | None
    trained: FactorFile

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self.weights.pretrained.folder

    @property
    def from_hub(self) -> bool:
        """Whether the base model's name is one on the hub, which means something elsewhere too."""
        return self.described.base_model != EMBEDDED_MODEL and not Path(self.described.base_model).is_dir()

    @property
    def base_name(self) -> str:
        """The base model as others would name it: its name on the hub, else its folder here."""
        return self.described.base_model if self.from_hub else str(self.base)

    @property
    def changed(self) -> dict[str, Target | None]:
        """The base model's parameters that training has changed -> the adapted linear whose weight it is, if any."""
        whole = dict.fromkeys(one.name for one in self.whole)
        return {**self.method.changed_parameters(self.targets, self.trained), **whole}

    @property
    def method(self) -> Method:
        """The method that trained it."""
        return METHODS[self.described.method]


def open_finished_run(run: Path, base: str | None = None, trust_remote_code: bool = False, hint: str = "") -> Source:
    """Open the run of a folder; no weight is read yet.

    Args:
        base: folder or hub name of the base model, if it has moved since the run.
        trust_remote_code: allow Python code that comes with the base model, where the adapter was trained with it.
        hint: what else can be done with an unfinished run that has saved something, for the message.

    Raises:
        ValueError: the folder is no run, the run still trains, is unfinished or damaged, the base model has other
            layers, or the run needs code that is not allowed.
    """
    finished = FinishedRun.open(run, "--run", hint)
    return open_trained(finished, run / ADAPTER, finished.report(), base, trust_remote_code)


def open_trained(
    run: RunState, folder: Path, report: dict, base: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Open what a run has trained, in whatever state the run is; no weight is read yet.

    Args:
        folder: the run's adapter, or one that was made of a checkpoint.
        report: what the run has measured of itself so far.
        base: folder or hub name of the base model, if it has moved since the run.
        trust_remote_code: allow Python code that comes with the base model, where the adapter was trained with it.

    Raises:
        ValueError: the adapter is damaged, the base model has other layers, or the run needs code that is not allowed.
    """
    described = adapter_file.read_description(folder, trust_remote_code)
    config = run.settings()
    described.check_residual(config.residual)
    described, base_folder = find_base(described, base)
    check_numerics(described.numerics, base_folder, described.loading, say)
    model = skeleton(base_folder, described.loading)
    weights = DiskWeightSource.of_model(base_folder, model, described.digests)
    method = method_of(described)
    grow_tables(model, rows_for(described.new_tokens))  # after its weights were found, which have the shapes on disk
    selection = method.choose(model, described.adapter)
    _check_layers(base_folder, selection.targets, described)
    opened = {name: adapter_file.open_factors(folder, name, described) for name in method.adapter_files}
    if unchecked := described.unchecked(opened, [name for name, _ in model.named_parameters()]):
        say(f"{folder}: {unchecked}")
    formats = precision.resolve_precision(described.precision, None, "cpu")
    return Source(
        config,
        report,
        folder,
        described,
        trust_remote_code,
        model,
        weights,
        selection.targets,
        selection.whole,
        formats,
        residual_storage.resolve_storage(described.residual, formats, torch.device("cpu")),
        opened.get(adapter_file.INITIAL),
        opened[adapter_file.TRAINED],
    )


def find_base(described: Description, base: str | None) -> tuple[Description, Path]:
    """An adapter's description with the base model where it lies now, and that model's folder.

    Args:
        base: folder or hub name of the base model, if it is no longer where the description says.

    Raises:
        ValueError: there is no such model.
    """
    if base is not None:
        place = Path(base).expanduser()
        described = replace(described, base_model=str(place.resolve()) if place.exists() else base)
    try:
        return described, find_model(described.base_model, described.loading)
    except ValueError as error:
        raise ValueError(f"{error}; say where the base model is: --base FOLDER") from error


def check_source(source: Source, progress: TensorProgress) -> None:
    """Read the base model and the factors once, and compare every parameter's digest with that of training.

    Raises:
        ValueError: naming the first parameter that differs or cannot be read, or whose factors have other shapes.
    """
    digests, weights, changed = source.described.digests, source.weights, source.changed
    for name in changed:
        if name not in digests:
            raise ValueError(
                f"{file_of(source.adapter, CONFIG)} has no digest of {name}: it is not this base model's adapter"
            )
    for name in progress(list(digests)):
        if name not in weights.origins:
            raise ValueError(f"{source.base} has no {name}: it is not the base model that was trained on")
        weights.parameter(name)
        if (target := changed.get(name)) is not None:
            for file in (source.initial, source.trained):
                if file is not None:
                    source.method.factors(file, target)


def _check_layers(base: Path, targets: list[Target], described: Description) -> None:
    """Stop where the base model's linears are not those of the adapter.

    Raises:
        ValueError: naming the first linear that differs.
    """
    found = {target.name: target.layout for target in targets}
    for name in [*described.layers, *found]:
        has, wants = found.get(name, "absent"), described.layers.get(name, "absent")
        if has != wants:
            raise ValueError(f"{base} does not fit the adapter: {name} is {has} here, {wants} there: wrong base model")
