"""A checkpoint opened as if the run had ended there: the run may train on meanwhile, or have been stopped.

The trained tensors are put together from what all ranks have saved, whatever their number and the ZeRO stage, into an
adapter in a folder of its own. From there on nothing reads the checkpoint any more, which the run may replace by newer
ones at any time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import INITIAL, TRAINED, Description, read_description, write_description
from sorsa_ds.model.new_tokens import grow_tables, rows_for
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.tensor_file import write_tensors
from sorsa_ds.run.checkpoint.folder import BEST, LATEST
from sorsa_ds.run.checkpoint.manifest import FILE, Manifest, read_manifest
from sorsa_ds.run.checkpoint.named import named_checkpoint
from sorsa_ds.run.checkpoint.trained import trained_values
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.paths import ADAPTER, CHAT_TEMPLATE, TOKENIZER
from sorsa_ds.run.source import Source, find_base, open_trained
from sorsa_ds.runtime import digest, precision
from sorsa_ds.runtime.files import private_folder
from sorsa_ds.sorsa import residual_storage


@contextmanager
def open_checkpoint(
    run: Path, asked: str, beside: Path, base: str | None = None, trust_remote_code: bool = False
) -> Iterator[Source]:
    """A context with the run as it was when it saved a checkpoint.

    Args:
        run: the run's folder.
        asked: `latest`, `best`, the number of a step, or the name of a checkpoint's folder.
        beside: the trained tensors are put together in a folder beside this path, until the context ends.
        base: folder or hub name of the base model, if it has moved since the run.
        trust_remote_code: allow Python code that comes with the base model, where the adapter was trained with it.

    Raises:
        ValueError: there is no such run or checkpoint, it is damaged, the run has removed it meanwhile, or the disk
            refuses.
    """
    state = RunState(run)
    state.check_is_run("--run")
    named_checkpoint(run, asked, "--checkpoint")  # a wrong name shows at once
    beside.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(beside) as private:
        folder = private / ADAPTER
        folder.mkdir()
        described, base_folder = find_base(read_description(run / ADAPTER, trust_remote_code), base)
        shapes = _trained_shapes(described, base_folder)
        saved = _gathered(state, asked, folder / TRAINED, shapes)
        files = {TRAINED: digest.of_file(folder / TRAINED)}
        if saved.initial_factors:
            files[INITIAL] = saved.initial_factors
        write_description(folder, replace(described, files=files))
        for name in (INITIAL, CHAT_TEMPLATE, TOKENIZER):
            if (original := (run / ADAPTER / name).resolve()).exists():
                (folder / name).symlink_to(original)
        yield open_trained(state, folder, _report(saved, shapes), base, trust_remote_code)


def _trained_shapes(described: Description, base: Path) -> dict[str, torch.Size]:
    """The trained tensors' names and shapes, from the model that was trained, without memory.

    Args:
        base: the base model's folder.
    """
    model = skeleton(base, described.loading)
    grow_tables(model, rows_for(described.new_tokens))
    formats = precision.resolve_precision(described.precision, None, "cpu")
    cpu = torch.device("cpu")
    storage = residual_storage.resolve_storage(described.residual, formats, cpu)
    method_of(described).operation(described, formats, storage, torch.device("meta"))(model)
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gathered(state: RunState, asked: str, path: Path, shapes: dict[str, torch.Size]) -> Manifest:
    """Write the trained tensors of a checkpoint to a file; returns the checkpoint's description.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the run has removed it meanwhile.
    """
    tried: list[Path] = []
    while True:
        checkpoint = named_checkpoint(state.folder, asked, "--checkpoint")
        try:
            return _written(checkpoint, path, shapes)
        except (OSError, ValueError) as error:
            if _is_whole(checkpoint):
                raise ValueError(f"--checkpoint: {error}") from error
            if asked not in (LATEST, BEST) or checkpoint in tried:
                raise ValueError(
                    f"--checkpoint: {checkpoint} was removed while it was read: the run keeps its newest ones only "
                    f"(output.keep_checkpoints); --checkpoint {LATEST} takes the newest"
                ) from error
            tried.append(checkpoint)  # the run has saved a newer or a better one


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint still has all of its files, damaged or not."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError:
        return (checkpoint / FILE).exists()
    return all((checkpoint / name).exists() for name in manifest.files)


def _written(checkpoint: Path, path: Path, shapes: dict[str, torch.Size]) -> Manifest:
    """Put a checkpoint's tensors together in a file, after a check of all digests.

    Raises:
        ValueError: something is missing or damaged.
    """
    values = trained_values(checkpoint)
    specs = [TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()]
    write_tensors(path, specs, (values(name, shape) for name, shape in shapes.items()))
    return read_manifest(checkpoint)


def _report(manifest: Manifest, shapes: dict[str, torch.Size]) -> dict:
    """What the run had measured of itself by then, as report.json calls it."""
    progress = manifest.progress
    return {
        "steps": progress.step,
        "eval_loss_start": progress.eval_loss_start,
        "reg_loss_end": progress.reg_loss,
        "trainable_parameters": sum(shape.numel() for shape in shapes.values()),
        "versions": manifest.versions,
    }
