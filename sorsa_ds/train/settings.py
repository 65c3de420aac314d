"""The first stations of a run: its processes are started, and everything that the settings left open is resolved."""

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from sorsa_ds.config import deepspeed_json
from sorsa_ds.config.batch_size import AUTO, data_ranks
from sorsa_ds.config.command_line import with_absolute_paths
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.settings import (
    check_package,
    check_settings,
    unused_note,
    with_trained_tokens,
    without_unused_of_file,
)
from sorsa_ds.model.new_tokens import new_token_ids
from sorsa_ds.model.pretrained import PretrainedWeights, find_model
from sorsa_ds.plan.check import fit_memory
from sorsa_ds.plan.utilisation import Utilisation, find_utilisation
from sorsa_ds.run.paths import CONFIG
from sorsa_ds.runtime import collectives, precision
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.device import this_device
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.runtime.process import local_ranks, ranks_of_each_node, start_process
from sorsa_ds.sorsa import residual_storage
from sorsa_ds.sorsa.residual_storage import Storage
from sorsa_ds.train.options import Invocation
from sorsa_ds.train.origin import Origin
from sorsa_ds.train.preflight.check import check_job


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedJob:
    """The processes of a job, which have found each other, and what they were asked for.

    config: the settings as given, with absolute paths, without those of a file that the method does not use, and with
        embeddings and head trained whole where new tokens need it.
    ds_config: the DeepSpeed JSON as given.
    device: where this rank computes. device_type: the same on all ranks.
    """

    config: RunConfig
    ds_config: deepspeed_json.Json
    device: torch.device
    device_type: precision.Device


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """All settings of a run, with open ones filled in.

    config: the settings with what was left open filled in, as config.yaml keeps them.
    model_folder: where the pre-trained model lies on this machine.
    new_tokens: the ids of `data.new_tokens`.
    ds_config: the DeepSpeed JSON as given. resolved: what DeepSpeed gets, and the figures that follow from it.
    formats: number formats. storage: how the residual is kept.
    utilisation: what MFU is computed from.
    device: where this rank computes. device_type: the same on all ranks.
    """

    config: RunConfig
    model_folder: Path
    new_tokens: dict[str, int]
    ds_config: deepspeed_json.Json
    resolved: deepspeed_json.Resolved
    formats: Precision
    storage: Storage
    utilisation: Utilisation
    device: torch.device
    device_type: precision.Device


def start_job(invocation: Invocation) -> StartedJob:
    """Read the DeepSpeed JSON, start the process group, and compare the ranks. A collective call.

    Raises:
        ValueError: a broken file, ranks that did not come, or whatever the preflight finds.
    """
    config = with_absolute_paths(invocation.config)
    ds_config = deepspeed_json.read_ds_config(invocation.ds_config)
    timeout = timedelta(minutes=config.train.timeout_minutes)
    device_type = start_process(timeout)
    device = this_device()
    check_job(invocation, ds_config, device, timeout, sys.argv[1:])
    config, unused = without_unused_of_file(config, invocation.on_command_line)
    run = invocation.named_run
    if unused and (run is None or invocation.file != run / CONFIG):  # a run's own file has only what was resolved
        say(unused_note(config.method, unused, invocation.file))
    return StartedJob(config=with_trained_tokens(config), ds_config=ds_config, device=device, device_type=device_type)


def resolve_settings(job: StartedJob, origin: Origin) -> RunSettings:
    """Fill in what was left open, and check that settings, method and machine go together. A collective call.

    What depends on the model comes last: the micro-batch, if the planner is to choose it.

    Raises:
        ValueError: settings that do not go together, with each other or with those of the run that goes on; a model
            that cannot be found; or a run that does not fit into the memory.
    """
    groups = data_ranks(collectives.world_size(), job.config.train.sequence_parallel)
    config = replace(job.config, train=origin.split_batch(job.config.train, groups))
    json_says = deepspeed_json.precision_from_json(job.ds_config)
    formats = precision.resolve_precision(config.train.precision, json_says, job.device_type)
    resolved = _resolved_json(job, config, formats)
    config = _resolved_config(config, resolved, formats)
    check_settings(config, resolved.zero_stage, formats)
    check_package(config)
    storage = collectives.together(
        lambda: residual_storage.resolve_storage(config.residual, formats, job.device), job.device
    )
    origin.check_settings(config)
    model_folder = find_model(config.model, config.loading)
    # The files are compared with the model before its memory is planned: what is wrong with them is told first.
    check_files = PretrainedWeights(model_folder).origins
    resolved = fit_memory(model_folder, config, job.ds_config, resolved, formats, storage, check_files)
    return RunSettings(
        config=_resolved_config(config, resolved, formats),
        model_folder=model_folder,
        new_tokens=new_token_ids(model_folder, config.loading, config.data.new_tokens),
        ds_config=job.ds_config,
        resolved=resolved,
        formats=formats,
        storage=storage,
        utilisation=find_utilisation(model_folder, config, job.ds_config, resolved, formats, storage),
        device=job.device,
        device_type=job.device_type,
    )


def _resolved_json(job: StartedJob, config: RunConfig, formats: Precision) -> deepspeed_json.Resolved:
    """The DeepSpeed JSON as resolved for this job; where the optimizer steps on the CPU, its threads are set.

    Raises:
        ValueError: settings, JSON and number of ranks do not go together.
    """
    resolved = deepspeed_json.resolve_ds_config(
        job.ds_config,
        config.train,
        collectives.world_size(),
        job.device_type,
        formats.name,
        ranks_of_each_node(),
        config.data.max_length,
    )
    if job.device_type == "cuda" and "offload_optimizer" in resolved.ds["zero_optimization"]:
        say(precision.set_offload_threads(local_ranks()))
    return resolved


def _resolved_config(config: RunConfig, resolved: deepspeed_json.Resolved, formats: Precision) -> RunConfig:
    """The settings with what was left open filled in, but for a micro-batch that the planner is still to choose."""
    left = bool(resolved.micro_choices)
    train = replace(
        config.train,
        precision=formats.name,
        micro_batch_size=AUTO if left else resolved.micro_batch_size,
        gradient_accumulation_steps=None if left else resolved.gradient_accumulation_steps,
        global_batch_size=resolved.global_batch_size,
        gradient_clipping=resolved.gradient_clipping,
    )
    return replace(config, train=train, residual=residual_storage.resolve_residual(config.residual, formats))
