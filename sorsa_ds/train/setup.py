"""From a command line to a run that is ready to train: every choice made, said, and checked before time is spent."""

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

import torch
from torch import nn

from sorsa_ds import methods
from sorsa_ds.config import deepspeed_json
from sorsa_ds.config.command_line import with_absolute_paths
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan, pad_token_id
from sorsa_ds.data.examples import examples
from sorsa_ds.data.tokenize import show_example
from sorsa_ds.engine.engine import adamw, cosine_with_warmup
from sorsa_ds.methods.settings import check
from sorsa_ds.model import init_report, schedule
from sorsa_ds.model.adapter_file import INITIAL
from sorsa_ds.model.load import load_operated
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.model.sharding import Whole, Zero3
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.plan.check import check_memory
from sorsa_ds.run.checkpoint.keeper import Keeper
from sorsa_ds.run.checkpoint.resume import find
from sorsa_ds.run.folder import RunLog, choose_folder, hold
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.run.recorder import Recorder
from sorsa_ds.run.snapshots import check_continues, stored_linears
from sorsa_ds.runtime import collectives, precision
from sorsa_ds.runtime.console import say, table, tracked, tracked_by_cost
from sorsa_ds.runtime.process import peak_resident_gib, ranks_of_each_node, start_process, this_device
from sorsa_ds.sorsa import regularizer, residual_storage
from sorsa_ds.train import preflight
from sorsa_ds.train.invocation import Invocation
from sorsa_ds.train.start_check import check_fits
from sorsa_ds.train.trainer import Trainer


def assemble(invocation: Invocation) -> Trainer:
    """Build everything that a run needs. A collective call: all ranks of the job make it.

    Raises:
        ValueError: whatever the user can mend, before the model is loaded where that is possible.
    """
    config = with_absolute_paths(invocation.config)
    raw = deepspeed_json.read_ds_config(invocation.ds_config)
    deepspeed_json.check_zero_keys(raw, invocation.ds_config)
    timeout = timedelta(minutes=config.train.timeout_minutes)
    device_type = start_process(timeout)
    device, world = this_device(), collectives.world_size()
    preflight.check(invocation, raw, device, timeout, sys.argv[1:])
    resume = find(invocation.resume, config, device) if invocation.resume else None
    if resume is not None:
        config = replace(config, train=resume.regroup(config.train, world))
    formats = precision.resolve_precision(config.train.precision, deepspeed_json.precision_from_json(raw), device_type)
    resolved = deepspeed_json.resolve_ds_config(
        raw, config.train, world, device_type, formats.name, ranks_of_each_node()
    )
    config = _settled(config, resolved, formats)
    check(config, resolved.zero_stage, formats)
    storage = collectives.together(lambda: residual_storage.resolve_storage(config.residual, formats, device), device)
    if resume is None:
        reg = None
        if config.method == "sorsa":
            reg = regularizer.resolve_regularizer(
                config.regularizer,
                learning_rate=config.train.learning_rate,
                accumulation_steps=resolved.gradient_accumulation_steps,
            )
        again = invocation.resume is not None
        folder = choose_folder(config.output, config.model, config.method, device, again)
    else:
        resume.check(config)
        reg = regularizer.Regularizer(**resume.manifest.regularizer) if resume.manifest.regularizer else None
        folder = resume.run
    lock = hold(folder, device)
    say(formats.why)

    model_folder = find_model(config.model, config.loading)
    tokenizer = load_tokenizer(model_folder, config.loading)
    train_examples, eval_examples = examples(config.data, tokenizer, config.train.seed)
    plan = BatchPlan(
        train_examples,
        micro_batch_size=resolved.micro_batch_size,
        accumulation=resolved.gradient_accumulation_steps,
        rank=collectives.rank(),
        world_size=world,
        seed=config.train.seed,
        pad_token_id=pad_token_id(tokenizer),
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    data = plan.digest
    if resume is not None:
        resume.check_data(data)
    check_fits(model_folder, config.loading, [*train_examples, *eval_examples])
    check_memory(model_folder, config, raw, resolved, formats, storage)
    stored = []
    if config.analysis.every:
        skeletal = skeleton(model_folder, config.loading)
        stored = stored_linears(skeletal, config)
        if resume is not None:
            done = resume.manifest.progress.step
            collectives.together(lambda: check_continues(skeletal, config, folder, done), device, on=0)
    say(show_example(train_examples[0], tokenizer))

    torch.manual_seed(config.train.seed + collectives.rank())  # dropout differs between ranks
    began = time.perf_counter()
    loaded = load_operated(
        model_folder,
        methods.operation(
            config,
            formats,
            storage,
            device,
            seed=config.train.seed,
            initial=resume and resume.run / ADAPTER / INITIAL,
            trained=resume and resume.tensors.values,
        ),
        loading=config.loading,
        placement=Zero3(resolved.ds, device) if resolved.zero_stage == 3 else Whole(device),
        device=device,
        digests=resume and resume.manifest.base,
        progress=_decomposing if config.method == "sorsa" else _loading,
    )
    initialisation = None
    if resume is None:
        if loaded.reports:
            say(init_report.table(loaded.reports))
        initialisation = init_report.as_json(
            loaded.reports,
            seconds=time.perf_counter() - began,
            world_size=world,
            peak_gib=collectives.gather_lists([peak_resident_gib()]),
        )
    if config.train.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    engine = methods.engine(config, plan.steps)(
        loaded.model,
        resolved.ds,
        adamw(
            config.train.learning_rate, config.train.adam_betas, config.train.adam_epsilon, config.train.weight_decay
        ),
        cosine_with_warmup(plan.steps, min(round(config.train.warmup_ratio * plan.steps), plan.steps - 1)),
        reg,
        loaded.exact_factors,
    )
    loaded.exact_factors.clear()
    say(
        table(
            [
                ("model", config.model),
                *methods.describe(config, loaded.targets, engine.trained_numbers, reg),
                ("ranks", f"{world} x {device_type}, ZeRO stage {resolved.zero_stage}"),
                ("batch", f"{resolved.global_batch_size} = {resolved.micro_batch_size} x {world} ranks x "
                          f"{resolved.gradient_accumulation_steps} accumulated"),
                ("steps", f"{plan.steps} over {len(train_examples):,} examples"),
                ("run folder", str(folder)),
            ]
        )
    )  # fmt: skip
    keeper = Keeper(folder, config, raw, engine, reg, loaded.digests, data, resume)
    log = RunLog(folder, config, resolved.ds, raw, initialisation, keeper.progress.step)
    recorder = Recorder(folder, engine, stored, keeper.progress.step)
    return Trainer(config, engine, loaded, plan, eval_examples, folder, log, keeper, recorder, lock)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: the architecture does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"train.gradient_checkpointing: {type(model).__name__} does not support it")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _loading(rounds: list) -> Iterable:
    """A bar over the rounds of a model of which nothing, or little, is decomposed."""
    return tracked(rounds, len(rounds), "loading", "round")


def _decomposing(rounds: list) -> Iterable:
    """The plan of the initialisation, and a bar over its rounds."""
    say(schedule.describe(rounds))
    costs = [max(item.cost for item in one if item) for one in rounds]
    return tracked_by_cost(rounds, costs, "decomposing")


def _settled(config: RunConfig, resolved: deepspeed_json.Resolved, formats: precision.Precision) -> RunConfig:
    """The configuration with what was left open filled in, as config.yaml keeps it."""
    train = replace(
        config.train,
        precision=formats.name,
        micro_batch_size=resolved.micro_batch_size,
        gradient_accumulation_steps=resolved.gradient_accumulation_steps,
        global_batch_size=resolved.global_batch_size,
        gradient_clipping=resolved.gradient_clipping,
    )
    return replace(config, train=train, residual=residual_storage.resolve_residual(config.residual, formats))
