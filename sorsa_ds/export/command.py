"""What launch/export.py does: refuse before anything is written, write, publish."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sorsa_ds.export.card import CARD, model_card, publish
from sorsa_ds.export.chat_template import write_chat_template
from sorsa_ds.export.formats import prepare, shown_per_tensor
from sorsa_ds.export.options import Options, check_options
from sorsa_ds.export.tokenizer import write_tokenizer
from sorsa_ds.run.checkpoint.as_run import open_checkpoint
from sorsa_ds.run.checkpoint.folder import LATEST
from sorsa_ds.run.paths import run_of
from sorsa_ds.run.source import Source, check_source, open_finished_run
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.whole_folder import whole_folder


def export(options: Options) -> Path:
    """Write the folder `options.output`; returns it.

    Raises:
        ValueError: an option that does not go with the format, a run that is not finished, a base model that is not
            the one that was trained on, a folder that holds something, a disk that is full. Nothing is left then.
    """
    check_options(options)
    output = options.output.expanduser().resolve()
    _check_free(output)
    if options.push_to_hub:
        _check_publishing(options.push_to_hub, output)
    with _opened(options, output) as (source, notes):
        _write(source, options, output, notes)
    say(f"Exported to {output}")
    if options.push_to_hub:
        say(f"Published: {publish(output, options.push_to_hub, options.private)}")
    return output


@contextmanager
def _opened(options: Options, output: Path) -> Iterator[tuple[Source, list[str]]]:
    """A context with what is to be exported, and notes on its origin.

    Raises:
        ValueError: there is no such run or checkpoint, or the run is not finished and no checkpoint was asked for.
    """
    given, base, trusted = options.run.expanduser().absolute(), options.base, options.trust_remote_code
    run, asked = run_of(given), options.checkpoint
    if run != given:
        if asked is not None:
            raise ValueError(f"--checkpoint goes with the folder of a run, and --run names a checkpoint: {given}")
        asked = given.name
    if asked is None:
        hint = f"To export what it has saved so far, add --checkpoint {LATEST}."
        yield open_finished_run(run, base, trusted, hint), []
        return
    with open_checkpoint(run, asked, output.with_name(f"{output.name}.checkpoint"), base, trusted) as source:
        yield source, [f"This is the run's state after step {source.report['steps']}, from a checkpoint."]


def _write(source: Source, options: Options, output: Path, notes: list[str]) -> None:
    """Check the run's parts, and write the export.

    Args:
        notes: on its origin.

    Raises:
        ValueError: the parts do not belong together, or the disk refuses. Nothing is left then.
    """
    prepared = prepare(source, options)
    _check_room(output, prepared.nbytes)
    check_source(source, shown_per_tensor("checking the base model"))
    try:
        with whole_folder(output) as folder:
            notes = [
                *notes,
                *prepared.write(folder),
                *write_tokenizer(source, options.format, folder),
                *write_chat_template(source, folder),
            ]
            write_text(folder / CARD, model_card(source, options.format, notes))
    except OSError as error:
        raise ValueError(f"--output: {output} cannot be written: {error.strerror or error}") from error
    for line in notes:
        say(line)


def _check_free(output: Path) -> None:
    """Stop where the output folder holds something.

    Raises:
        ValueError: naming it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} exists and is not an empty folder; name another one")


def _check_publishing(name: str, output: Path) -> None:
    """Stop where what is exported could not be published.

    Raises:
        ValueError: the hub does not know this user, or cannot be reached.
    """
    try:
        hub.check_logged_in()
    except ValueError as error:
        raise ValueError(
            f"--push_to_hub {name}: {error}. Nothing was exported; without that option it can be, and uploaded later: "
            f"hf upload {name} {output}"
        ) from error


def _check_room(output: Path, wanted: int) -> None:
    """Stop where the disk has less room than so many bytes.

    Raises:
        ValueError: naming both sizes.
    """
    place = next(folder for folder in output.parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < wanted:
        raise ValueError(f"--output: {output} would take {wanted / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB left")
