"""Peak memory and time of a merged export, for a checkpoint several times larger than one file of the result.

    python benchmarks/export.py --gib 1 --max_shard_size 200MB

A Llama of that size in bf16 and an adapter of random factors are written first; the export runs in a process of its
own. Memory is counted from the process's start on, mapped pages of the checkpoint included; it is compared with the
largest file plus the largest layer in fp32. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.helpers.common import ROOT, Peak, say, write_llama
from sorsa_ds.config.schema import AdapterConfig, RunConfig, TrainConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.export.command import Options, export
from sorsa_ds.model import adapter_file
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.weight_sources import DiskWeightSource


def main() -> None:
    """Write a run, export it, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--max_shard_size", default="200MB")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name)
        in_own_process(write_run, folder, a.gib, a.rank)
        result = in_own_process(measure, folder, a.max_shard_size)
    say(f"{result['checkpoint_gib']:.2f} GiB in {result['files']} files of up to {result['file_gib']:.3f} GiB: "
        f"{result['rss_gib']:.3f} GiB, {result['rss_over_file_and_layer']:.2f} of one file and one layer, "
        f"{result['seconds']:.1f} s")  # fmt: skip
    print(json.dumps(result))


def in_own_process(function, *arguments):
    """Call a function in a fresh process, which has no memory of its own yet; returns its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_run(folder: Path, gib: float, rank: int) -> None:
    """Write a base model, and a run's folder as if the run had been trained in mixed precision."""
    base, run = folder / "base", folder / "run"
    write_llama(base, gib, flat=True)
    config = RunConfig(model=str(base), adapter=AdapterConfig(rank=rank), train=TrainConfig(precision="mixed"))
    model = skeleton(base, config.loading)
    weights = DiskWeightSource.of_model(base, model, {})
    for parameter, _ in model.named_parameters():
        weights.parameter(parameter)
    targets = select_targets(model, config.adapter)
    (run / "adapter").mkdir(parents=True)
    for file in (adapter_file.INITIAL, adapter_file.TRAINED):
        shapes = {
            (t.name, leaf): shape
            for t in targets
            for leaf, shape in (("U", (t.out_features, rank)), ("s", (rank,)), ("V", (t.in_features, rank)))
        }
        save_file({f"{name}.{leaf}": torch.randn(shape) / shape[0] for (name, leaf), shape in shapes.items()},
                  run / "adapter" / file)  # fmt: skip
    adapter_file.describe_adapter(run / "adapter", config, targets, weights.digests)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "report.json").write_text("{}")


def measure(folder: Path, max_shard_size: str) -> dict:
    """Export the run, and compare the peak of memory with the largest file and layer."""
    began = time.perf_counter()
    with Peak() as peak:
        output = export(Options(folder / "run", "merged", folder / "merged", max_shard_size=max_shard_size))
    seconds = time.perf_counter() - began
    files = [file.stat().st_size / 2**30 for file in output.glob("*.safetensors")]
    layers = adapter_file.read_description(folder / "run" / "adapter").layers.values()
    layer = max(4 * each["out"] * each["in"] for each in layers) / 2**30
    return {
        "checkpoint_gib": sum(files),
        "files": len(files),
        "file_gib": max(files),
        "layer_gib": layer,
        "checkpoint_over_file": sum(files) / max(files),
        "rss_gib": peak.gib,
        "rss_over_file_and_layer": peak.gib / (max(files) + layer),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
