"""What launch/plan.py does: find the model's configuration, plan, print."""

import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download

from sorsa_ds.config.schema import EMBEDDED_MODEL, LoadingConfig
from sorsa_ds.methods.settings import unused_note, without_unused_of_file
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.options import Request
from sorsa_ds.plan.report import as_json, as_text, plan
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.runtime.console import printable, say


def print_plan(request: Request) -> bool:
    """Plan and print; returns whether the job fits.

    Raises:
        ValueError: settings that do not go together, or a model that cannot be found or built.
    """
    config, unused = without_unused_of_file(request.config, request.on_command_line)
    if unused:  # --json owns stdout
        print(printable(unused_note(config.method, unused, request.file)), file=sys.stderr)
    job = Job.of(config, request.ds_config, request.hardware)
    planned = plan(configuration_of(config.model, config.loading), job)
    print(json.dumps(as_json(planned)) if request.as_json else printable(as_text(planned)))
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
