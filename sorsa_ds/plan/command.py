"""What launch/plan.py does: parse, find the model's configuration, plan, print."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download

from sorsa_ds import cli, ds_config
from sorsa_ds.config import EMBEDDED_MODEL, LoadingConfig, RunConfig
from sorsa_ds.console import say
from sorsa_ds.embedded import ensure_embedded_model
from sorsa_ds.plan.job import GIB, Hardware, Job
from sorsa_ds.plan.report import as_json, as_text, plan
from sorsa_ds.shapes import shipped

OPTIONS = {
    "config": "YAML file with settings",
    "ds_config": f"DeepSpeed JSON (default {cli.DEFAULT_DS_CONFIG})",
    "gpus": "GPUs of a node (default 1)",
    "nodes": "nodes (default 1)",
    "gpu_memory": "of one GPU, as 80GiB or 80GB (default 80GiB)",
    "gpu_tflops": "dense bf16 TFLOP/s of a GPU, as its maker says (default 989: H100)",
    "efficiency": "share of these that training reaches (default 0.4)",
    "gpu_bandwidth": "GB/s that a GPU receives inside its node (default 360: NVLink 4 at 80 %)",
    "node_bandwidth": "GB/s that a node receives from the others (default 320: eight 400 Gb/s cards at 80 %)",
}
USAGE = """\
What a run will need, before anything is loaded: memory, bytes over the wire, seconds a step, and whether it fits.

  python launch/plan.py --config launch/recipes/llama3_70b_8gpu.yaml --ds_config ds_configs/zero3.json --gpus 8
  python launch/plan.py --ds_config ds_configs/stage0.json --json model=meta-llama/Llama-2-7b-hf sorsa.rank=128

  --json           print one JSON object and nothing else
"""
_UNITS = {"": 1, "B": 1, "MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}


def run(argv: Sequence[str]) -> bool:
    """Plan and print; returns whether the job fits.

    Raises:
        ValueError: everything wrong with the command line, or a model that cannot be found or built.
    """
    words = [word for word in argv if word != "--json"]
    errors = cli.Errors()
    options, overrides = cli.split(words, OPTIONS, errors)
    if "help" in options:
        print(cli.help_text(RunConfig, USAGE, OPTIONS))
        return True
    hardware, file, config, given = Hardware(), None, None, None
    with errors.noted():
        hardware = _hardware(options)
    with errors.noted():
        given = ds_config.load(
            cli.find_file("--ds_config", options.get("ds_config", cli.DEFAULT_DS_CONFIG), "ds_configs/*.json")
        )
    with errors.noted():
        file = cli.find_file("--config", options["config"], "launch/recipes/*.yaml") if "config" in options else None
    with errors.noted():
        config = cli.load(RunConfig, file, overrides, OPTIONS)
    errors.stop()
    job = Job.of(config, given, hardware)
    planned = plan(configuration_of(config.model, config.loading), job)
    as_one_object = len(words) < len(argv)
    print(json.dumps(as_json(planned)) if as_one_object else as_text(planned))
    return planned.fits


def configuration_of(model: str, loading: LoadingConfig) -> Path:
    """A folder with the config.json of a model: the model's own, a shape that ships, or the hub's file.

    Raises:
        ValueError: there is none.
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
            f"model: {model!r} is no folder here, no shape of it ships with sorsa_ds, and the hub does not give its "
            f"config.json: {error}"
        ) from error


def _hardware(options: dict[str, str]) -> Hardware:
    fields = {"gpus": int, "nodes": int, "gpu_tflops": float, "efficiency": float, "gpu_bandwidth": float,
              "node_bandwidth": float}  # fmt: skip
    values: dict = {}
    for name, kind in fields.items():
        if name in options:
            try:
                value = kind(options[name])
            except ValueError:
                value = 0
            if not 0 < value < 1e9:
                raise ValueError(f"--{name} {options[name]}: must be a {'whole ' if kind is int else ''}number above 0")
            values[name.removeprefix("gpu_") if name == "gpu_tflops" else name] = value
    if "gpu_memory" in options:
        values["gpu_memory"] = size(options["gpu_memory"])
    return Hardware(**values)


def size(text: str) -> int:
    """Bytes of `80GiB`, `24 GB`, `512MiB`.

    Raises:
        ValueError: it reads otherwise, or is less than a GiB of memory could be.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not found[2]:
        raise ValueError(f"--gpu_memory {text}: write a number and a unit, as 80GiB or 80GB")
    value = int(float(found[1]) * _UNITS[found[2].upper()])
    if not GIB // 1024 <= value <= 2**50:
        raise ValueError(f"--gpu_memory {text}: no GPU has so much or so little")
    return value
