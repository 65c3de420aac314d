"""The plan at the beginning of a run: said in a line, and what cannot fit is refused before anything is loaded."""

from pathlib import Path

import torch

from sorsa_ds.config.deepspeed_json import Resolved
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.plan.job import Hardware, Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.report import short
from sorsa_ds.runtime import collectives, process
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.device import device_type, this_device
from sorsa_ds.runtime.memory import GIB, free_memory
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import Storage


def check_memory(
    folder: Path, config: RunConfig, given: dict, resolved: Resolved, formats: Precision, storage: Storage
) -> None:
    """Say what a run needs, and stop where this machine has less. A collective call.

    With train.check_memory=false it does nothing.

    Args:
        folder: the model's folder.
        given: the DeepSpeed JSON as the user wrote it, and `resolved` as it was resolved for this job.

    Raises:
        ValueError: the run cannot fit, or the model has no such targets or ranks; on every rank.
    """
    if not config.train.check_memory:
        return
    job = Job(config, given, resolved, formats, storage, Hardware(gpus=collectives.world_size()))
    needed = collectives.together(lambda: memory(job, facts(folder, job)), this_device())
    assert needed is not None  # every rank has planned
    free = free_memory() // process.local_ranks()
    if device_type() == "cuda":
        places = {
            "on its GPU": (needed.total, torch.cuda.mem_get_info()[1]),
            "of its node's memory": (needed.total_host, free),
        }
    else:
        places = {"of free memory": (needed.total + needed.total_host, free)}
    say(short(needed, places))

    def refuse() -> None:
        for where, (wanted, limit) in places.items():
            if wanted > limit:
                raise ValueError(
                    f"the run needs about {wanted / GIB:.2f} GiB per rank, more than the {limit / GIB:.2f} GiB {where} "
                    f"that it may take here: launch/plan.py with the same settings tells what would fit; "
                    f"train.check_memory=false skips this check"
                )

    collectives.together(refuse, this_device())
