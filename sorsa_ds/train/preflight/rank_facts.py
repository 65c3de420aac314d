"""What each rank tells of itself: where it runs, on what, with which packages and settings, and what is free there."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sorsa_ds.config.yaml_io import flat
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.cache import cache_folder
from sorsa_ds.runtime.device import device_type
from sorsa_ds.runtime.memory import free_memory
from sorsa_ds.runtime.versions import package_versions
from sorsa_ds.train.options import Invocation

PACKAGES = ("torch", "deepspeed", "transformers")
COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank tells of itself.

    rank, local_rank: its number in the job and on its node.
    node: the name of its host.
    launcher: the launcher's number in the job; two of them may share a host.
    device: what it computes on.
    device_id: tells GPUs of one host apart; empty on a CPU.
    gpus: how many it sees.
    versions: the versions of Python and of packages, by name.
    said: settings, DeepSpeed JSON and command line; local rank 0 alone tells them.
    memory: free bytes of the host, or of the control group that the rank is in.
    disks: folder -> free bytes.
    """

    rank: int
    local_rank: int
    node: str
    launcher: int
    device: str
    device_id: str
    gpus: int
    versions: Mapping[str, str]
    said: Mapping[str, Any] = field(default_factory=dict)
    memory: int
    disks: Mapping[str, int]


def gather_facts(invocation: Invocation, ds_config: dict, argv: list[str]) -> RankFacts:
    """The facts of this rank.

    Args:
        ds_config: the DeepSpeed JSON as it was read.
        argv: the command line without the program.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    folders = {"run folder": runs_folder(invocation), "cache": cache_folder()}
    return RankFacts(
        rank=collectives.rank(),
        local_rank=local_rank,
        node=os.uname().nodename,
        launcher=int(os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", "0"))),
        versions={
            "python": platform.python_version(),
            **package_versions(("sorsa_ds", *PACKAGES)),
        },
        said=_said(invocation, ds_config, argv) if local_rank == 0 else {},
        memory=free_memory(),
        disks={f"{what} ({path})": shutil.disk_usage(_existing(path)).free for what, path in folders.items()},
        **_device(local_rank),
    )


def runs_folder(invocation: Invocation) -> Path:
    """The folder in which the folder of the job's run lies, or will lie."""
    if invocation.named_run is not None:
        return invocation.named_run.parent
    return Path(invocation.config.output.folder).expanduser().absolute()


def _said(invocation: Invocation, ds_config: dict, argv: list[str]) -> dict[str, Any]:
    words = [word for word in argv if not word.startswith("--local_rank")]
    return {
        **flat(asdict(invocation.config), schema=type(invocation.config)),
        **flat(ds_config, "DeepSpeed JSON: "),
        COMMAND_LINE: " ".join([Path(sys.argv[0]).name, *words]),
    }


def _device(local_rank: int) -> dict[str, Any]:
    gpus = torch.cuda.device_count() if device_type() == "cuda" else 0
    if local_rank >= gpus:
        return {"device": "no GPU" if gpus else "CPU", "device_id": "", "gpus": gpus}
    found = torch.cuda.get_device_properties(local_rank)
    return {"device": found.name, "device_id": str(found.uuid), "gpus": gpus}


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
