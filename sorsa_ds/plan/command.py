"""What launch/plan.py does: parse, find the model's configuration, plan, print."""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download

from sorsa_ds.config import command_line, deepspeed_json
from sorsa_ds.config.byte_size import read_bytes
from sorsa_ds.config.schema import EMBEDDED_MODEL, LoadingConfig, RunConfig
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.plan.job import Hardware, Job
from sorsa_ds.plan.report import as_json, as_text, plan
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.runtime.console import say

OPTIONS = {
    "config": "YAML file with settings",
    "ds_config": f"DeepSpeed JSON (default {command_line.DEFAULT_DS_CONFIG})",
    "gpus": "GPUs per node (default 1)",
    "nodes": "number of nodes (default 1)",
    "gpu_memory": "memory of one GPU, as 80GiB or 80GB (default 80GiB)",
    "host_memory": "memory of a node's CPUs that the job may take (default: unknown, and then only printed)",
    "gpu_tflops": "dense bf16 TFLOP/s of a GPU, as its maker says (default 989: H100)",
    "efficiency": "share of --gpu_tflops that training reaches (default 0.4)",
    "gpu_bandwidth": "GB/s that a GPU receives inside its node (default 360: NVLink 4 at 80 %)",
    "node_bandwidth": "GB/s that a node receives from the others (default 320: eight 400 Gb/s cards at 80 %)",
    "memory_bandwidth": "GB/s of a GPU's own memory, as its maker says (default 3350: H100)",
}
USAGE = """\
What a run will need, before anything is loaded: memory, bytes over the wire, seconds per step, and whether it fits.

  python launch/plan.py --config launch/recipes/llama3_70b_8gpu.yaml --ds_config ds_configs/zero3.json --gpus 8
  python launch/plan.py --ds_config ds_configs/stage0.json --json model=meta-llama/Llama-2-7b-hf sorsa.rank=128

  --json           print one JSON object and nothing else
"""


def run(argv: Sequence[str]) -> bool:
    """Plan and print; returns whether the job fits.

    Raises:
        ValueError: everything wrong with the command line, or a model that cannot be found or built.
    """
    words = [word for word in argv if word != "--json"]
    errors = command_line.Errors()
    options, overrides = command_line.split(words, OPTIONS, errors)
    if "help" in options:
        print(command_line.help_text(RunConfig, USAGE, OPTIONS))
        return True
    hardware, file, config, given = Hardware(), None, None, None
    with errors.noted():
        hardware = _hardware(options, errors)
    with errors.noted():
        given = deepspeed_json.read_ds_config(
            command_line.find_file(
                "--ds_config", options.get("ds_config", command_line.DEFAULT_DS_CONFIG), "ds_configs/*.json"
            )
        )
    with errors.noted():
        file = (
            command_line.find_file("--config", options["config"], "launch/recipes/*.yaml")
            if "config" in options
            else None
        )
    with errors.noted():
        config = command_line.load_settings(RunConfig, file, overrides, OPTIONS)
    errors.stop()
    job = Job.of(config, given, hardware)
    planned = plan(configuration_of(config.model, config.loading), job)
    as_one_object = len(words) < len(argv)
    print(json.dumps(as_json(planned)) if as_one_object else as_text(planned))
    return planned.fits


def configuration_of(model: str, loading: LoadingConfig) -> Path:
    """A folder with the config.json of a model: the model's own, a shape that ships, or the hub's file.

    Raises:
        ValueError: there is no such model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model == EMBEDDED_MODEL:
        return ensure_embedded_model(say)
    if (shape := shipped(model)) is not None:
        return shape
    try:
        return Path(hf_hub_download(model, "config.json", revision=loading.revision)).parent
    except Exception as error:
        raise ValueError(
            f"model: {model!r} is not a folder here, no shape of it ships with sorsa_ds, and the hub does not give its "
            f"config.json: {error}"
        ) from error


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
        ValueError: the text is not a size, or the size is less than 1 GiB or more than 1024 TiB.
    """
    return read_bytes(text, option, "write a number and a unit, as 80GiB or 80GB", smallest="1GiB")
