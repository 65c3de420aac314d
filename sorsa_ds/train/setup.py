"""From a command line to a run that is ready to train: every choice made, said, and checked before time is spent."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from sorsa_ds.config.batch_size import AUTO, told_ranks
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan
from sorsa_ds.engine import optimizers, schedules
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.methods.loraplus import learning_faster
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model import schedule
from sorsa_ds.model.load import AdaptedModel, load_adapted_model
from sorsa_ds.model.new_tokens import rows_for
from sorsa_ds.model.rotary import rotary_rows
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.model.sharding import Whole, Zero3
from sorsa_ds.model.uneven_calls import set_uneven_leaves, told_leaves
from sorsa_ds.run.checkpoint.keeper import CheckpointKeeper
from sorsa_ds.run.checkpoint.manifest import RunProgress
from sorsa_ds.run.checkpoint.restore import go_back
from sorsa_ds.run.folder import lock_run_folder
from sorsa_ds.run.log import RunLog
from sorsa_ds.run.recorder import SnapshotRecorder
from sorsa_ds.run.trackers import Trackers
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.background import patiently
from sorsa_ds.runtime.console import say, say_details, table, tracked, tracked_by_cost
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.runtime.numerics import seed_rank, set_numerics
from sorsa_ds.runtime.words import typed
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.train.beginning import Beginning
from sorsa_ds.train.embedding_noise import add_embedding_noise
from sorsa_ds.train.inputs import Inputs, read_inputs
from sorsa_ds.train.kept_tokenizer import keep_chat_template, keep_tokenizer
from sorsa_ds.train.loss import router_rows
from sorsa_ds.train.options import Invocation
from sorsa_ds.train.origin import Origin, find_origin
from sorsa_ds.train.sampler import Sampler
from sorsa_ds.train.settings import RunSettings, resolve_settings, start_job
from sorsa_ds.train.step_meter import StepMeter
from sorsa_ds.train.trainer import Trainer


def assemble(invocation: Invocation) -> Trainer:
    """Build everything that a run needs, station by station. A collective call: all ranks of the job make it.

    Raises:
        ValueError: whatever the user can mend, before the model is loaded where that is possible.
    """
    job = start_job(invocation)
    origin = find_origin(invocation.resume, job.config, job.device)
    settings = resolve_settings(job, origin)
    run = hold_run(settings, origin)
    inputs = read_inputs(settings, origin)
    model = build_model(settings, origin)
    settings = resolve_rate(settings, model)
    engine = build_engine(settings, run, inputs, model)
    return build_trainer(settings, run, inputs, model, engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRun:
    """A run whose folder is held by this job.

    origin: whether the run is new or goes on.
    lock: the lock on the folder, to be released at the end.
    regularizer: the regulariser of every step; None where the method has none.
    """

    origin: Origin
    folder: Path
    lock: RunLock
    regularizer: Regularizer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """The model to fine-tune, on this rank's device.

    initialisation: what init.json will hold; None where the run goes on and has the file.
    """

    loaded: AdaptedModel
    initialisation: dict | None


def hold_run(settings: RunSettings, origin: Origin) -> OpenedRun:
    """Make the run's folder or take the one that it has, and hold it. A collective call.

    Raises:
        ValueError: the folder holds another run, is in use, or cannot be made.
    """
    regularizer = origin.regularizer(settings.config)
    folder = origin.run_folder(settings.config, settings.device)
    lock = lock_run_folder(folder, settings.device)
    origin.keep_settings(folder, settings.config, settings.resolved.ds, settings.ds_config, settings.device)
    say(settings.formats.why)
    say(set_numerics(settings.device_type, deterministic=settings.config.train.deterministic))
    return OpenedRun(origin=origin, folder=folder, lock=lock, regularizer=regularizer)


def build_model(settings: RunSettings, origin: Origin) -> BuiltModel:
    """Load the pre-trained weights, and make of them what the method trains. A collective call.

    Raises:
        ValueError: a bad target, rank or weight, or not the weights that the run began with; on every rank.
    """
    config, device = settings.config, settings.device
    seed_rank(config.train.seed, collectives.rank())
    began = time.perf_counter()
    operation = method_of(config).operation(
        config,
        settings.formats,
        settings.storage,
        device,
        seed=config.train.seed,
        initial=origin.initial_factors,
        trained=origin.trained_values,
    )
    loaded = load_adapted_model(
        settings.model_folder,
        operation,
        loading=config.loading,
        placement=Zero3(settings.resolved.ds, device) if settings.resolved.zero_stage == 3 else Whole(device),
        device=device,
        dtype=settings.formats.residual_dtype,
        digests=origin.base_digests,
        rows=rows_for(settings.new_tokens),
        progress=_decomposing if method_of(config).decomposes else _loading,
    )
    if settings.resolved.zero_stage == 3 and (leaves := set_uneven_leaves(loaded.model)):
        say(told_leaves(leaves))
    initialisation = origin.report_initialisation(loaded, time.perf_counter() - began)
    method_of(config).check_decomposed(config, loaded.reports)
    if config.train.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    add_embedding_noise(loaded.model, config.train.neftune_noise_alpha)
    return BuiltModel(loaded=loaded, initialisation=initialisation)


def resolve_rate(settings: RunSettings, model: BuiltModel) -> RunSettings:
    """The settings with a number in the place of `train.learning_rate=auto`.

    Raises:
        ValueError: the method's rule gives none.
    """
    config = settings.config
    if config.train.learning_rate != AUTO:
        return settings
    rate = method_of(config).suggested_rate(config, model.loaded.reports)
    say(f"train.learning_rate=auto: {rate:g}, from the singular values that are trained.")
    return replace(settings, config=replace(config, train=replace(config.train, learning_rate=rate)))


def build_engine(settings: RunSettings, run: OpenedRun, inputs: Inputs, model: BuiltModel) -> SorsaEngine:
    """Give the model its optimizer, schedule and regulariser, and tell what will be trained. A collective call.

    Raises:
        ValueError: the steps leave no room for the method's own schedule.
    """
    train, steps, loaded = settings.config.train, inputs.batches.steps, model.loaded
    engine = method_of(settings.config).engine(settings.config, steps)(
        loaded.model,
        settings.resolved.ds,
        optimizers.optimizer(train, *learning_faster(settings.config, loaded.model)),
        schedules.schedule(train, steps),
        run.regularizer,
        loaded.exact_factors,
    )
    loaded.exact_factors.clear()  # the engine's masters hold these numbers now
    say(_summary(settings, run, inputs, loaded, engine))
    if loaded.targets and (warning := loaded.selection.warning) is not None:
        say(warning)
    return engine


def build_trainer(
    settings: RunSettings, run: OpenedRun, inputs: Inputs, model: BuiltModel, engine: SorsaEngine
) -> Trainer:
    """Restore the state from which the run goes on, open its logs, and put everything together. A collective call.

    Raises:
        ValueError: the run's folder cannot be written or is damaged, or the checkpoint lacks something.
    """
    config = settings.config
    keep_chat_template(run.folder, inputs, settings.device)
    keep_tokenizer(run.folder, inputs, settings)
    progress = run.origin.restore(engine, config, inputs.batches.steps)
    sampler, unasked = _sampler(config, inputs, engine)
    return Trainer(
        config=config,
        engine=engine,
        beginning=Beginning(model.loaded, inputs.numerics, settings.new_tokens),
        batches=inputs.batches,
        held_out=inputs.held_out,
        sources=inputs.sources,
        sampler=sampler,
        unasked=unasked,
        folder=run.folder,
        log=_open_log(settings, run, inputs, model, progress),
        keeper=_keeper(settings, run, inputs, model, engine, progress),
        recorder=_recorder(settings, run, inputs, engine, progress.step),
        meter=_meter(settings, run, inputs, engine, progress.step),
        lock=run.lock,
        sequence=_sharing_ranks(config, engine),
    )


def _keeper(
    settings: RunSettings, run: OpenedRun, inputs: Inputs, model: BuiltModel, engine: SorsaEngine, progress: RunProgress
) -> CheckpointKeeper:
    return CheckpointKeeper(
        run=run.folder,
        config=settings.config,
        ds_config=settings.ds_config,
        engine=engine,
        base=model.loaded.digests,
        numerics=inputs.numerics,
        data=inputs.data_digest,
        progress=progress,
        last=run.origin.checkpoint,
    )


def _sampler(config: RunConfig, inputs: Inputs, engine: SorsaEngine) -> tuple[Sampler | None, str]:
    """What asks the model held-out prompts; None where it cannot be asked, with the reason."""
    if config.train.sequence_parallel > 1:
        return None, f"with train.sequence_parallel={config.train.sequence_parallel} each rank has a share of a text"
    if not inputs.questions:
        return None, "no held-out example has a prompt" if inputs.held_out else "there are no held-out prompts"
    return Sampler(engine, inputs.tokenizer, inputs.questions, config.evaluation.sample_tokens, inputs.room), ""


def _recorder(
    settings: RunSettings, run: OpenedRun, inputs: Inputs, engine: SorsaEngine, first: int
) -> SnapshotRecorder:
    stored = method_of(settings.config).trained_under(engine.module, inputs.stored)
    return SnapshotRecorder(run.folder, engine, stored.values(), first)


def _sharing_ranks(config: RunConfig, engine: SorsaEngine) -> SequenceParallel:
    """The ranks that compute a micro-batch together, with the engine's model made to take shards. A collective call."""
    sequence = SequenceParallel(config.train.sequence_parallel, timedelta(minutes=config.train.timeout_minutes))
    sequence.attach(cast(PreTrainedModel, engine.module))
    return sequence


def _meter(settings: RunSettings, run: OpenedRun, inputs: Inputs, engine: SorsaEngine, first: int) -> StepMeter:
    train, steps = settings.config.train, inputs.batches.steps
    return StepMeter(train, settings.utilisation, engine.clock, run.folder, first, steps)


def _open_log(
    settings: RunSettings, run: OpenedRun, inputs: Inputs, model: BuiltModel, progress: RunProgress
) -> RunLog:
    """Begin the trackers, which may refuse, and only then change what lies in the folder of a run that goes on."""
    config, device, checkpoint = settings.config, settings.device, run.origin.checkpoint
    trackers = patiently(lambda: Trackers(run.folder, config, continues=checkpoint is not None), device)
    go_back(checkpoint, progress, device)
    return collectives.together(
        lambda: RunLog(
            folder=run.folder,
            config=config,
            ds_config=settings.resolved.ds,
            given=settings.ds_config,
            initialised=model.initialisation,
            steps_done=progress.step,
            steps=inputs.batches.steps,
            trackers=trackers,
        ),
        device,
    )


def _summary(settings: RunSettings, run: OpenedRun, inputs: Inputs, loaded: AdaptedModel, engine: SorsaEngine) -> str:
    """What will be trained, on what, and where it is written, as a table."""
    config, resolved, world_size = settings.config, settings.resolved, collectives.world_size()
    adapters = engine.trained_numbers - sum(one.numel for one in loaded.selection.whole)
    sharing = told_ranks(world_size, config.train.sequence_parallel)
    batch = (
        f"{resolved.global_batch_size} = {resolved.micro_batch_size} x {sharing} x "
        f"{resolved.gradient_accumulation_steps} accumulated"
    )
    if isinstance(inputs.batches, BatchPlan) and inputs.batches.packing is not None:
        batch += f", packed: {len(inputs.batches.packed(0))} in the first step"
    if (told := inputs.batches.levelled) is not None:
        batch += f", levelled: {told}"
    return table(
        [
            ("model", config.model),
            *method_of(config).rows(config, loaded.targets, adapters, run.regularizer),
            *(loaded.selection.rows() if loaded.targets else ()),
            *router_rows(loaded.model),
            *rotary_rows(loaded.model.config, config.data.max_length),
            *_token_rows(settings.new_tokens, loaded.model),
            ("ranks", f"{world_size} x {settings.device_type}, ZeRO stage {resolved.zero_stage}"),
            ("batch", batch),
            ("steps", f"{inputs.batches.steps} over {inputs.data_size}"),
            ("learning rate", schedules.described(config.train)),
            ("mfu", settings.utilisation.told),
            ("run folder", typed(run.folder)),
        ]
    )


def _token_rows(new_tokens: dict[str, int], model: PreTrainedModel) -> list[tuple[str, str]]:
    """What new tokens have brought, as a row of the table."""
    if not new_tokens:
        return []
    ids, rows = sorted(new_tokens.values()), model.config.get_text_config().vocab_size
    told = f"{len(ids)} (ids {ids[0]} to {ids[-1]}); embeddings and head have {rows} rows, all of them trained"
    return [("new tokens", told)]


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: the architecture does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"train.gradient_checkpointing: {type(model).__name__} does not support it")
    enable = cast(PreTrainedModel, model).gradient_checkpointing_enable
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _loading(rounds: list) -> Iterable:
    """The rounds in which a model is filled, with a progress bar that counts them: all take about as long."""
    return tracked(rounds, len(rounds), "loading", "round")


def _decomposing(rounds: list) -> Iterable:
    """The rounds of a decomposition, told in a line, with a progress bar that knows their unequal costs."""
    say_details(schedule.describe_schedule(rounds))
    costs = [max(item.cost for item in one if item) for one in rounds]
    return tracked_by_cost(rounds, costs, "decomposing")
