"""Where the configuration of the planned model lies.

Nothing here imports transformers, so that a wrong name shows before that takes seconds. What has to be said goes to
stderr: with --json the plan has stdout for itself.
"""

from pathlib import Path

from huggingface_hub import hf_hub_download

from sorsa_ds.config.schema import EMBEDDED_MODEL, LoadingConfig
from sorsa_ds.model.embedded import ensure_embedded_model
from sorsa_ds.model.model_files import CONFIG, check_model_name, check_no_adapter
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.console import note


def configuration_of(model: str, loading: LoadingConfig) -> Path:
    """A folder with the config.json of a model: the model's own, a shape that ships, or the hub's file.

    Raises:
        ValueError: there is no such model.
    """
    check_model_name(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_no_adapter(folder)
        return folder
    if model == EMBEDDED_MODEL:
        return ensure_embedded_model(note)
    if (shape := shipped(model)) is not None:
        return shape

    def download(local_files_only: bool) -> str:
        return hf_hub_download(model, CONFIG, revision=loading.revision, local_files_only=local_files_only)

    try:
        return hub.fetched(model, loading.revision, download, note).parent
    except ValueError as error:
        raise ValueError(
            f"model: {model!r} is not a folder here, and no shape of it ships with sorsa_ds: {error}"
        ) from error
