"""What launch/plan.py does: find the model's configuration, plan, print."""

import json

from sorsa_ds.plan.configuration import configuration_of
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.options import Request
from sorsa_ds.plan.report import as_json, as_text, plan


def print_plan(request: Request) -> bool:
    """Plan and print; returns whether the job fits.

    Raises:
        ValueError: settings that do not go together, or a model that cannot be found or built.
    """
    config = request.config
    job = Job.of(config, request.ds_config, request.hardware)
    planned = plan(configuration_of(config.model, config.loading), job)
    print(json.dumps(as_json(planned)) if request.as_json else as_text(planned))
    return planned.fits
