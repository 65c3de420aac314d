"""Where a run comes from: it begins anew, or it goes on from a checkpoint.

The stations of `sorsa_ds.train.setup` are the same for both; wherever they differ, the station asks the run's origin.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.config.batch_size import AUTO
from sorsa_ds.config.schema import DataConfig, LoadingConfig, RunConfig
from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.methods.registry import method_of
from sorsa_ds.methods.settings import check_open_micro_batch
from sorsa_ds.model import init_report
from sorsa_ds.model.adapter_file import INITIAL
from sorsa_ds.model.load import AdaptedModel
from sorsa_ds.model.numerics import Numerics, check_numerics
from sorsa_ds.run.checkpoint.manifest import RunProgress
from sorsa_ds.run.checkpoint.restore import restore_training
from sorsa_ds.run.checkpoint.resume import WholeCheckpoint, find_checkpoint
from sorsa_ds.run.folder import make_run_folder, write_settings
from sorsa_ds.run.paths import ADAPTER, CHAT_TEMPLATE
from sorsa_ds.run.snapshots import check_continues
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.process import peak_resident_gib
from sorsa_ds.sorsa.regularizer import Regularizer


class Origin(Protocol):
    """What depends on whether a run is new or goes on. Methods that take a device or an engine are collective calls."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint from which the run goes on; None of a new run."""

    @property
    def initial_factors(self) -> Path | None:
        """The file of the tensors with which training began; None where they are still to be made."""

    @property
    def trained_values(self) -> Callable[[str, torch.Size], Tensor] | None:
        """Gives a trained tensor by name and shape, fp32 on the CPU; None where nothing is trained yet."""

    @property
    def base_digests(self) -> dict[str, str] | None:
        """What the digests of the pre-trained parameters must be; None where no run has seen them yet."""

    @property
    def stream(self) -> dict[str, Any] | None:
        """Where streamed data go on; None at their beginning, and where data are stored."""

    def data_settings(self, data: DataConfig) -> DataConfig:
        """The settings of the data with the chat template that the run was given, where it was given one."""

    def split_batch(self, train: TrainConfig, world_size: int) -> TrainConfig:
        """The settings with the batch that the run has, split for so many ranks that take micro-batches of their own.

        Raises:
            ValueError: the batch does not divide among the ranks.
        """

    def check_settings(self, config: RunConfig) -> None:
        """Stop where settings differ that must not change while a run goes on.

        Args:
            config: the settings as resolved; the micro-batch is `auto` if the planner is still to choose it.

        Raises:
            ValueError: naming all of them.
        """

    def regularizer(self, config: RunConfig) -> Regularizer | None:
        """The regulariser of every step; None where the method has none.

        Args:
            config: the settings as resolved.
        """

    def run_folder(self, config: RunConfig, device: torch.device) -> Path:
        """The folder of the run, which exists then.

        Raises:
            ValueError: the folder holds another run, or it cannot be made.
        """

    def check_numerics(self, numerics: Numerics, folder: Path, loading: LoadingConfig) -> None:
        """Stop where the base model's folder does not give the numbers that it gave when the run began.

        Args:
            numerics: what decides them now, besides the weights.
            folder: the base model's folder.

        Raises:
            ValueError: naming each field that differs.
        """

    def keep_settings(self, folder: Path, config: RunConfig, resolved: dict, given: dict, device: torch.device) -> None:
        """Write the settings into the folder of a new run. One that goes on keeps its own until they are found to fit.

        Args:
            resolved: the DeepSpeed JSON as resolved. given: the same as the user wrote it.
        """

    def check_data(self, digest: str) -> None:
        """Stop where the training examples are not those that the run has learned from.

        Raises:
            ValueError: their digest differs.
        """

    def check_length(self, config: RunConfig, steps: int, device: torch.device) -> None:
        """Say where a run goes on to another last step than was planned.

        Args:
            steps: the number of steps of the whole run.

        Raises:
            ValueError: more steps are done already, or the run stopped early and would not go on.
        """

    def check_snapshots(self, model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
        """Stop where the snapshots to come would be of other linears than those that the run has taken.

        Args:
            model: the base model; it needs no memory.

        Raises:
            ValueError: naming a linear.
        """

    def report_initialisation(self, loaded: AdaptedModel, seconds: float) -> dict | None:
        """Show how the layers were initialised; returns what init.json will hold, None where that is written already.

        A collective call.
        """

    def restore(self, engine: SorsaEngine, config: RunConfig, steps: int) -> RunProgress:
        """Bring the engine to the state from which the next step of `steps` starts; returns how far the run is.

        Raises:
            ValueError: the checkpoint lacks something.
        """


def find_origin(request: str | None, config: RunConfig, device: torch.device) -> Origin:
    """The origin that the command line asks for. A collective call.

    Args:
        request: what --resume says; None without it.

    Raises:
        ValueError: there is no such run or checkpoint, or it cannot be continued; on every rank.
    """
    if request is None:
        return NewRun(again=False)
    found = find_checkpoint(request, config, device)
    return NewRun(again=True) if found is None else ResumedRun(found)


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that begins at step 0.

    again: a folder with its name may be there if that run never saved a checkpoint.
    """

    again: bool
    checkpoint: ClassVar[None] = None
    initial_factors: ClassVar[None] = None
    trained_values: ClassVar[None] = None
    base_digests: ClassVar[None] = None
    stream: ClassVar[None] = None

    def data_settings(self, data: DataConfig) -> DataConfig:
        """The settings as they are: a new run reads the chat template that they name."""
        return data

    def split_batch(self, train: TrainConfig, world_size: int) -> TrainConfig:
        """The settings as they are: `resolve_ds_config` splits the batch."""
        return train

    def check_settings(self, config: RunConfig) -> None:
        """No earlier settings are there: only the regulariser must not follow from the memory."""
        if config.train.micro_batch_size == AUTO:
            check_open_micro_batch(config)

    def regularizer(self, config: RunConfig) -> Regularizer | None:
        """The regulariser that the settings describe."""
        assert config.train.gradient_accumulation_steps is not None, "the settings are resolved"
        return method_of(config).regularizer(config)

    def run_folder(self, config: RunConfig, device: torch.device) -> Path:
        """Make the folder of the new run, and return its path."""
        return make_run_folder(config.output, config.model, config.method, device, self.again)

    def check_numerics(self, numerics: Numerics, folder: Path, loading: LoadingConfig) -> None:
        """Nothing to check: no run has read the base model."""

    def keep_settings(self, folder: Path, config: RunConfig, resolved: dict, given: dict, device: torch.device) -> None:
        """Write the new run's settings into its folder, on rank 0."""
        collectives.together(lambda: write_settings(folder, config, resolved, given), device, on=0)

    def check_data(self, digest: str) -> None:
        """Nothing to check: no examples have been learned from."""

    def check_length(self, config: RunConfig, steps: int, device: torch.device) -> None:
        """Nothing to check: no step is done."""

    def check_snapshots(self, model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
        """Nothing to check: no snapshots are there."""

    def report_initialisation(self, loaded: AdaptedModel, seconds: float) -> dict | None:
        """The table of the layers on the console, and everything about them for init.json."""
        if loaded.reports:
            say(init_report.table(loaded.reports))
        return init_report.as_json(
            loaded.reports,
            seconds=seconds,
            world_size=collectives.world_size(),
            peak_gib=collectives.gather_lists([peak_resident_gib()]),
        )

    def restore(self, engine: SorsaEngine, config: RunConfig, steps: int) -> RunProgress:
        """Nothing to restore: the run is at step 0."""
        return RunProgress()


@dataclass(frozen=True, slots=True)
class ResumedRun:
    """A run that goes on after the last step of a saved checkpoint."""

    saved: WholeCheckpoint

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder."""
        return self.saved.path

    @property
    def initial_factors(self) -> Path | None:
        """The file that the run wrote when it began; methods that train whole weights have none."""
        return self.saved.run / ADAPTER / INITIAL

    @property
    def trained_values(self) -> Callable[[str, torch.Size], Tensor] | None:
        """The tensors of the checkpoint."""
        return self.saved.tensors.values

    @property
    def base_digests(self) -> dict[str, str] | None:
        """The digests of the parameters on which the run began."""
        return self.saved.manifest.base

    @property
    def stream(self) -> dict[str, Any] | None:
        """What the checkpoint says of it."""
        return self.saved.manifest.progress.stream

    def data_settings(self, data: DataConfig) -> DataConfig:
        """The settings with the run's own copy of its chat template, whatever has become of the file since then."""
        kept = self.saved.run / ADAPTER / CHAT_TEMPLATE
        return replace(data, chat_template=str(kept)) if kept.exists() else data

    def split_batch(self, train: TrainConfig, world_size: int) -> TrainConfig:
        """The settings with what is open as saved; the saved batch is regrouped where the ranks ask for it.

        On as many ranks as before, `auto` is the micro-batch that the run had, so that it goes on as if nothing had
        interrupted it. On others the planner chooses anew. A number of positions leaves it open.
        """
        then = self.saved.manifest.config["train"]
        if train.learning_rate == AUTO:
            train = replace(train, learning_rate=then["learning_rate"])
        size, before = then["global_batch_size"], then["micro_batch_size"]
        micro, accumulation = train.micro_batch_size, train.gradient_accumulation_steps
        levelled = isinstance(train.micro_batch_tokens, int)
        if not levelled and isinstance(micro, int) and accumulation and micro * accumulation * world_size == size:
            return train
        if micro == AUTO and before * then["gradient_accumulation_steps"] * world_size == size:
            micro = before
        if size % world_size:
            fitting = [n for n in range(1, size + 1) if size % n == 0]
            together = train.sequence_parallel
            who = "ranks" if together == 1 else f"groups of train.sequence_parallel={together} ranks"
            raise ValueError(
                f"--resume: the run's global batch of {size} examples does not divide among {world_size} {who}; take "
                f"{', '.join(map(str, fitting))} of them"
            )
        share = size // world_size
        if levelled:
            micro = None
        elif micro != AUTO:
            micro = next(m for m in range(min(micro or before, share), 0, -1) if share % m == 0)
        return replace(train, global_batch_size=size, micro_batch_size=micro, gradient_accumulation_steps=None)

    def check_settings(self, config: RunConfig) -> None:
        """Compare with the settings that the checkpoint holds."""
        self.saved.check_settings(config)

    def regularizer(self, config: RunConfig) -> Regularizer | None:
        """The regulariser with which the run began: other ranks, hence other accumulation, do not change it."""
        kept = self.saved.manifest.regularizer
        return Regularizer(**kept) if kept else None

    def run_folder(self, config: RunConfig, device: torch.device) -> Path:
        """Return the folder in which the resumed run began."""
        return self.saved.run

    def check_numerics(self, numerics: Numerics, folder: Path, loading: LoadingConfig) -> None:
        """Compare with what the checkpoint holds; one of an earlier version holds nothing of it."""
        try:
            check_numerics(self.saved.manifest.numerics, folder, loading, say, numerics)
        except ValueError as error:
            raise ValueError(f"--resume: {error}") from error

    def keep_settings(self, folder: Path, config: RunConfig, resolved: dict, given: dict, device: torch.device) -> None:
        """Nothing to write: the run has settings, and the log writes new ones once the checkpoint is found to fit."""

    def check_data(self, digest: str) -> None:
        """Compare with the digest that the checkpoint holds."""
        if digest != self.saved.manifest.data:
            raise ValueError(
                "--resume: the training examples are not those with which the run was started; a chat template that "
                "asks for today's date makes others on another day"
            )

    def check_length(self, config: RunConfig, steps: int, device: torch.device) -> None:
        """Compare with the settings, the step and the evaluations of the checkpoint, which rank 0 reads."""
        if told := collectives.together(lambda: self.saved.check_length(config, steps), device, on=0):
            say(told)

    def check_snapshots(self, model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
        """Compare with the snapshots in the run's folder, which rank 0 reads."""
        run, steps_done = self.saved.run, self.saved.manifest.progress.step
        collectives.together(lambda: check_continues(model, config, run, steps_done), device, on=0)

    def report_initialisation(self, loaded: AdaptedModel, seconds: float) -> dict | None:
        """Nothing to report: the layers were rebuilt, and init.json tells how they were initialised."""
        return None

    def restore(self, engine: SorsaEngine, config: RunConfig, steps: int) -> RunProgress:
        """Put optimizer, schedule and random states back."""
        return restore_training(self.saved, engine, config, steps)
