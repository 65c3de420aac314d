"""A checkpoint of the default model against DeepSpeed's own: bytes and seconds. And the memory of an export.

    python benchmarks/checkpoint.py

Both save the same run: one process, ZeRO-2, fp32, after one optimizer step. *Blocked* is how long training stands still
for a save. DeepSpeed saves twice: with its defaults, frozen parameters included, and with `exclude_frozen_parameters`.
The export's figures are those of `benchmarks/export.py`. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.export import in_own_process, measure, write_run
from benchmarks.helpers.common import DS_CONFIGS, ROOT, say


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model that is exported")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        result = in_own_process(checkpoints, Path(name), a.rank)
        in_own_process(write_run, Path(name, "export"), a.gib, 32)
        exported = in_own_process(measure, Path(name, "export"), "200MB")
    result |= {f"export_{key}": value for key, value in exported.items()}
    for key, value in result.items():
        say(f"{key:40} {value:,.3f}")
    print(json.dumps(result))


def checkpoints(folder: Path, rank: int) -> dict:
    """Save and load in our way and in DeepSpeed's, in a run that has taken one step."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    from sorsa_ds.engine.masters import inner_optimizer
    from sorsa_ds.model import factor_source
    from sorsa_ds.run.checkpoint import folder as folders
    from sorsa_ds.run.checkpoint import fragments, manifest
    from sorsa_ds.run.checkpoint.host_copies import HostCopies
    from sorsa_ds.run.checkpoint.saved import SavedTensors
    from sorsa_ds.train.options import parse
    from sorsa_ds.train.setup import assemble

    trainer = assemble(parse([
        f"--ds_config={DS_CONFIGS / 'zero2.json'}", f"output.folder={folder}", "output.name=run",
        f"adapter.rank={rank}", "train.precision=fp32", "train.steps=2", "data.eval_size=0",
    ]))  # fmt: skip
    trainer.prepare()
    trainer.start(folder / "run" / "adapter")
    trainer.step(0)
    keeper, engine = trainer.keeper, trainer.engine
    keeper.progress.step = 1
    trained = sum(target.trainable for target in trainer.beginning.loaded.targets)

    host = HostCopies(inner_optimizer(engine))
    blocked, _ = timed(lambda: fragments.snapshot(engine, host))
    save, path = timed(keeper.save)
    ours = size(path)
    found = manifest.read_manifest(path)
    verify, faults = timed(lambda: manifest.file_faults(path, found))
    assert not faults

    def load() -> None:
        saved = SavedTensors([path / name for name in found.files])
        fragments.restore_moments(engine, saved, 1)
        for target in trainer.beginning.loaded.targets:
            factor_source.from_values(saved.values)(target, engine.masters.fragments[0].master)

    load_seconds, _ = timed(load)
    result = {
        "bytes_per_trained_number": ours / trained, "blocked_seconds": blocked, "save_seconds": save,
        "verify_seconds": verify, "load_seconds": load_seconds,
    }  # fmt: skip
    for key, options in (("deepspeed", {}), ("deepspeed_without_frozen", {"exclude_frozen_parameters": True})):
        target = folder / key
        seconds, _ = timed(lambda target=target, options=options: engine.save_checkpoint(str(target), **options))
        back, _ = timed(lambda target=target: engine.load_checkpoint(str(target), load_module_strict=False))
        result |= {
            f"{key}_bytes_ratio": size(target) / ours, f"{key}_save_ratio": seconds / save,
            f"{key}_load_ratio": back / load_seconds,
        }  # fmt: skip
    assert folders.existing_checkpoints(folder / "run") == [path]
    return result


def timed(function: Callable) -> tuple[float, object]:
    """Call a function; returns the seconds that it took, and its result."""
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
