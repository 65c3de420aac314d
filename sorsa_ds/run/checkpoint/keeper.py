"""What keeps a run from being lost: it makes the checkpoints, and puts the training state back from one."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.adapter_file import INITIAL
from sorsa_ds.run.checkpoint import folder, fragments, random_state
from sorsa_ds.run.checkpoint.manifest import Manifest, Progress
from sorsa_ds.run.checkpoint.resume import Resume
from sorsa_ds.run.checkpoint.saved import read_own
from sorsa_ds.run.checkpoint.saver import Saver
from sorsa_ds.run.paths import ADAPTER, REPORT
from sorsa_ds.runtime import collectives, digest
from sorsa_ds.runtime.console import note, say
from sorsa_ds.sorsa.regularizer import Regularizer

PACKAGES = ("sorsa_ds", "torch", "deepspeed", "transformers")


class Keeper:
    """The checkpoints of one run. All methods are collective calls.

    Args:
        run: its folder.
        ds_config: the DeepSpeed JSON as it was given.
        base: digests of the pre-trained parameters. data: digest of the training examples.
        resume: where the run is continued; its optimizer, schedule and random states are put into the engine.

    `progress` is the run's own account, which the trainer keeps up to date.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        ds_config: dict,
        engine: SorsaEngine,
        regularizer: Regularizer | None,
        base: dict[str, str],
        data: str,
        resume: Resume | None,
    ):
        self._run, self._config, self._ds_config, self._engine = run, config, ds_config, engine
        self._regularizer, self._base, self._data = regularizer, base, data
        self._saver = Saver(run, config.output.keep_checkpoints, engine.device)
        self._random: dict[str, Tensor] = {}
        self.progress = Progress()
        if resume is not None:
            self._put_back(resume)

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

        A save that fails is told and training goes on; the earlier checkpoints are as they were.
        """
        self._random = {}
        self._try(self._saver.poll)
        if self.is_due:
            self._try(self._saver.finish)
            self._try(self._begin)

    def save(self) -> Path:
        """Save now, unless this step is saved already, and wait until the checkpoint is valid; returns it.

        Raises:
            ValueError: it cannot be written; on every rank.
        """
        self._try(self._saver.finish)
        if self._saver.last != folder.path_of(self._run, self.progress.step):
            self._begin()
            self._saver.finish()
        return folder.path_of(self._run, self.progress.step)

    def _try(self, saving: Callable[[], None]) -> None:
        """Tell what goes wrong, and let training go on."""
        try:
            saving()
        except ValueError as error:
            note(str(error))
        except collectives.PeerError:
            pass  # told by the rank that failed

    def _begin(self) -> None:
        manifest = Manifest(
            progress=Progress(**asdict(self.progress)),
            world_size=collectives.world_size(),
            zero_stage=self._engine.zero_optimization_stage(),
            scheduler=self._engine.lr_scheduler.state_dict(),
            regularizer=asdict(self._regularizer) if self._regularizer else {},
            config=asdict(self._config),
            ds_config=self._ds_config,
            base=self._base,
            initial_factors=self._initial_digest,
            data=self._data,
            versions={name: version(name) for name in PACKAGES},
        )
        tensors = fragments.snapshot(self._engine) | (self._random or random_state.take())
        self._saver.begin(tensors, manifest)

    @cached_property
    def _initial_digest(self) -> str:
        initial = self._run / ADAPTER / INITIAL
        return digest.of_file(initial) if collectives.rank() == 0 and initial.exists() else ""

    def _put_back(self, resume: Resume) -> None:
        saved = resume.manifest
        self.progress = saved.progress
        self._saver.last = resume.checkpoint
        fragments.restore_optimizer(self._engine, resume.tensors, self.progress.step)
        self._engine.restore_method_state(fragments.method_state(resume.checkpoint))
        self._engine.continue_after(self.progress.step, saved.scheduler)
        if saved.world_size == collectives.world_size():
            random_state.put_back(read_own(resume.checkpoint / f"rank-{collectives.rank():05d}.safetensors", "random/"))
        else:
            # Dropout cannot repeat what other ranks would have drawn; it must not repeat the first steps either.
            torch.manual_seed(hash((self._config.train.seed, self.progress.step, collectives.rank())))
        if collectives.rank() == 0:
            (self._run / REPORT).unlink(missing_ok=True)  # a finished run that goes on from an earlier checkpoint
            for path in folder.set_aside_after(self._run, self.progress.step):
                note(f"a later checkpoint is set aside: {path}")
        say(f"Going on after step {self.progress.step}, from {resume.checkpoint}.")
