"""What keeps a run from being lost: it decides when a checkpoint is due, and collects what goes into one."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.engine.masters import inner_optimizer
from sorsa_ds.model.numerics import Numerics
from sorsa_ds.run.checkpoint import fragments, random_state
from sorsa_ds.run.checkpoint.folder import checkpoint_path
from sorsa_ds.run.checkpoint.host_copies import HostCopies
from sorsa_ds.run.checkpoint.manifest import Manifest, RunProgress, digest_of_initial
from sorsa_ds.run.checkpoint.saver import CheckpointSaver
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.versions import package_versions

PACKAGES = ("sorsa_ds", "torch", "deepspeed", "transformers")


class CheckpointKeeper:
    """Makes the checkpoints of one run. All methods are collective calls.

    Args:
        run: the run's folder.
        config: the settings as resolved.
        ds_config: the DeepSpeed JSON as it was given.
        base: digests of the pre-trained parameters.
        numerics: what decides the base model's numbers besides them.
        data: digest of the training examples.
        progress: how far the run is; the trainer keeps it up to date.
        last: the checkpoint from which the run goes on; None of a new run.
    """

    def __init__(
        self,
        *,
        run: Path,
        config: RunConfig,
        ds_config: dict,
        engine: SorsaEngine,
        base: dict[str, str],
        numerics: Numerics,
        data: str,
        progress: RunProgress,
        last: Path | None,
    ):
        self._run, self._config, self._ds_config, self._engine = run, config, ds_config, engine
        self._base, self._numerics, self._data = base, numerics, data
        self._saver = CheckpointSaver(run, config.output.keep_checkpoints, engine.device, last)
        self._host = HostCopies(inner_optimizer(engine))
        self._random: dict[str, Tensor] = {}
        self.progress = progress

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint belongs after the last step."""
        every = self._config.output.save_every
        return every > 0 and self.progress.step % every == 0

    def step_begins(self) -> None:
        """Remember the random states: a step that is broken off is made again from its beginning."""
        self._random = random_state.take()

    def step_ends(self) -> None:
        """After an optimizer step: save if it is time, and see to a save that is under way.

        A failed save is reported; training continues and earlier checkpoints stay valid.
        """
        self._random = {}
        self._try(self._saver.poll)
        if self.is_due:
            self.finish_saving()
            self._try(self._begin)

    def save(self) -> Path:
        """Save now, unless this step is saved already, and wait until the checkpoint is valid; returns it.

        Raises:
            ValueError: the checkpoint cannot be written; on every rank.
        """
        self.finish_saving()
        wanted = checkpoint_path(self._run, self.progress.step)
        if self._saver.last != wanted:
            self._begin()
            self._saver.finish()
        return wanted

    def keep_best(self) -> None:
        """Let the checkpoint of the last step be the best one; it is saved unless that is done or under way already.

        A failed save is reported; training continues.
        """
        if self._saver.step_at_hand != self.progress.step:
            self.finish_saving()
            self._try(self._begin)
        if self._saver.step_at_hand == self.progress.step:
            self._try(self._saver.mark_best)

    def finish_saving(self) -> None:
        """Wait until a save that is under way is valid; a failed one is reported."""
        self._try(self._saver.finish)

    def _try(self, saving: Callable[[], None]) -> None:
        """Save; a failure is reported, and training continues."""
        try:
            saving()
        except ValueError as error:
            note(str(error))
        except collectives.PeerError:
            pass  # told by the rank that failed

    def _begin(self) -> None:
        manifest = Manifest(
            progress=replace(self.progress),
            world_size=collectives.world_size(),
            zero_stage=self._engine.zero_optimization_stage(),
            scheduler=self._engine.lr_scheduler.state_dict(),
            regularizer={} if (reg := self._engine.regularizer) is None else asdict(reg),
            config=asdict(self._config),
            ds_config=self._ds_config,
            base=self._base,
            numerics=self._numerics,
            initial_factors=self._initial_digest,
            data=self._data,
            versions=package_versions(PACKAGES),
        )
        tensors, wait = fragments.snapshot(self._engine, self._host)
        self._saver.begin(tensors | (self._random or random_state.take()), wait, manifest)

    @cached_property
    def _initial_digest(self) -> str:
        return digest_of_initial(self._run) if collectives.rank() == 0 else ""
