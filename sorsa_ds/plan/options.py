"""The command line of launch/plan.py: its options, its usage, and what one command line asks for."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.config import command_line, deepspeed_json
from sorsa_ds.config.byte_size import read_bytes
from sorsa_ds.config.renamed import name_now
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.runtime.memory import GIB

_H100 = Hardware()
OPTIONS = {
    "config": "YAML file with settings",
    "ds_config": f"DeepSpeed JSON (default {command_line.DEFAULT_DS_CONFIG})",
    "gpus": f"GPUs per node (default {_H100.gpus})",
    "nodes": f"number of nodes (default {_H100.nodes})",
    "gpu_memory": f"memory of one GPU, as 80GiB or 80GB (default {_H100.gpu_memory // GIB}GiB)",
    "host_memory": "memory of a node's CPUs that the job may take (default: unknown; the need is told and not judged)",
    "gpu_tflops": f"dense bf16 TFLOP/s of a GPU, as its maker says (default {_H100.tflops:g}: H100)",
    "efficiency": f"share of --gpu_tflops that training reaches (default {_H100.efficiency:g})",
    "gpu_bandwidth": f"GB/s that a GPU receives inside its node (default {_H100.gpu_bandwidth:g}: NVLink 4 at 80 %)",
    "node_bandwidth": f"GB/s that a node receives from the others (default {_H100.node_bandwidth:g}: eight 400 Gb/s "
    "cards at 80 %)",
    "memory_bandwidth": f"GB/s of a GPU's own memory, as its maker says (default {_H100.memory_bandwidth:g}: H100)",
}
USAGE = """\
What a run will need, before anything is loaded: memory, bytes over the wire, seconds per step, and whether it fits.

  python launch/plan.py --config launch/recipes/llama3_70b_8gpu.yaml --ds_config ds_configs/zero3.json --gpus 8
  python launch/plan.py --ds_config ds_configs/stage0.json --json model=meta-llama/Llama-2-7b-hf adapter.rank=128

  --json           print one JSON object and nothing else
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What one command line asks for.

    ds_config: the DeepSpeed JSON as the user wrote it. as_json: whether the plan is printed as one JSON object.
    file: the YAML file with settings, if there is one. on_command_line: the settings that the command line itself sets.
    """

    config: RunConfig
    ds_config: dict
    hardware: Hardware
    as_json: bool
    file: Path | None = None
    on_command_line: frozenset[str] = frozenset()


def parse(argv: Sequence[str]) -> Request:
    """Read the command line; `--help` prints the usage and exits.

    Raises:
        ValueError: the message lists everything that is wrong.
    """
    words = [word for word in argv if word != "--json"]
    errors = command_line.Errors()
    options, overrides = command_line.split(words, OPTIONS, errors)
    if "help" in options:
        print(command_line.help_text(RunConfig, USAGE, OPTIONS))
        raise SystemExit(0)
    hardware, file, config, given = Hardware(), None, RunConfig(), {}
    with errors.noted():
        hardware = _hardware(options, errors)
    with errors.noted():
        given = deepspeed_json.read_ds_config(command_line.find_ds_config(options))
    with errors.noted():
        file = command_line.find_settings_file(options)
    with errors.noted():
        config = command_line.load_settings(RunConfig, file, overrides, OPTIONS)
    errors.stop()
    set_here = frozenset(name_now(path) for path, _ in overrides)
    return Request(config, given, hardware, as_json=len(words) < len(argv), file=file, on_command_line=set_here)


def _hardware(options: dict[str, str], errors: command_line.Errors) -> Hardware:
    values: dict = {}
    for name in OPTIONS.keys() & options.keys() - {"config", "ds_config"}:
        with errors.noted():
            read = size if name.endswith("_memory") else _count if name in ("gpus", "nodes") else _figure
            values["tflops" if name == "gpu_tflops" else name] = read(options[name], f"--{name}")
    return Hardware(**values)


def _count(text: str, option: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or not int(text):
        raise ValueError(f"{option} {text}: must be a whole number from 1 to 999999")
    return int(text)


def _figure(text: str, option: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e9:
            return value
    raise ValueError(f"{option} {text}: must be a number above 0 and below 1e9")


def size(text: str, option: str = "--gpu_memory") -> int:
    """The bytes of a memory size such as `80GiB`, `24 GB` or `1.5TiB`.

    Raises:
        ValueError: the size cannot be read, or is less than 1 GiB or more than 1024 TiB.
    """
    return read_bytes(text, option, "write a number and a unit, as 80GiB or 80GB", smallest="1GiB")
