"""What launch/plan.py does: find the model's configuration, plan, print."""

import json
import sys

from sorsa_ds.methods.settings import unused_note, without_unused_of_file
from sorsa_ds.plan.configuration import configuration_of
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.micro_batch import NoEstimateError
from sorsa_ds.plan.options import Request
from sorsa_ds.plan.report import as_json, as_text, plan
from sorsa_ds.runtime.console import printable


def print_plan(request: Request) -> bool:
    """Plan and print; returns whether the job fits.

    Raises:
        ValueError: settings that do not go together, or a model that cannot be found or built.
    """
    config, unused = without_unused_of_file(request.config, request.on_command_line)
    if unused:  # --json owns stdout
        print(printable(unused_note(config.method, unused, request.file)), file=sys.stderr)
    job = Job.of(config, request.ds_config, request.hardware)
    try:
        planned = plan(configuration_of(config.model, config.loading), job)
    except NoEstimateError as error:
        raise ValueError(
            f"the memory and time of {config.model} cannot be estimated ({error}); it may train all the same"
        ) from error
    print(json.dumps(as_json(planned)) if request.as_json else printable(as_text(planned)))
    return planned.fits
