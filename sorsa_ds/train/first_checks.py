"""What shows of a run in its first second: names, files, the hub and keys, before libraries and models take time.

Nothing that is slow to import is imported here.
"""

import os
from collections.abc import Callable
from pathlib import Path

from sorsa_ds.config.command_line import Errors
from sorsa_ds.config.mixing import sources_of
from sorsa_ds.config.schema import EMBEDDED_MODEL, DataConfig, LoadingConfig, OutputConfig, RunConfig
from sorsa_ds.data.data_files import check_data
from sorsa_ds.model.embedded import check_embedded_model
from sorsa_ds.model.model_files import CONFIG, check_model_files, check_model_name
from sorsa_ds.run.checkpoint.named import check_unused, named_checkpoints
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.tracker_kinds import check_installed
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.extras import check_extra
from sorsa_ds.train.options import Invocation


def check_first(invocation: Invocation, logs: bool) -> None:
    """Stop at everything that cannot work, all of it told at once.

    Args:
        logs: whether the run's logs are written by this process or by one that it starts, so that keys are looked for.

    Raises:
        ValueError: names or folders of runs, the model, the data, the hub's answer, the trackers or the key of Weights
            & Biases are not as the run needs them.
    """
    config, errors = invocation.config, Errors()
    checks: list[Callable[[], None]] = [
        lambda: _check_run(invocation),
        lambda: _check_model(config.model, config.loading),
        lambda: _check_data(config.data),
        lambda: _check_directions(invocation),
        lambda: _check_trackers(config.output, logs),
    ]
    for check in checks:
        with errors.noted():
            check()
    errors.stop()


def check_inputs(config: RunConfig) -> None:
    """Like `check_first`, for a command that only reads the model's folder and the data.

    Raises:
        ValueError: the model or the data is not there.
    """
    errors = Errors()
    with errors.noted():
        _check_model(config.model, config.loading)
    with errors.noted():
        _check_data(config.data)
    errors.stop()


def check_own_node(invocation: Invocation) -> None:
    """Like `check_first`, by the first rank of each node: the others would find the same. Only rank 0 writes logs."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_first(invocation, logs=os.environ.get("RANK", "0") == "0")


def on_one_node() -> bool:
    """Whether all ranks of this job are on one node, as the launcher says it."""
    world = os.environ.get("WORLD_SIZE", "1")
    return world == os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))


def _check_directions(invocation: Invocation) -> None:
    """Stop where the file of input directions is not there; a run that goes on needs none."""
    path = invocation.config.sorsa.directions
    if path is not None and invocation.resume is None and not Path(path).expanduser().is_file():
        raise ValueError(f"sorsa.directions={path}: there is no such file; `sorsa calibrate` writes it")


def _check_run(invocation: Invocation) -> None:
    output = invocation.config.output
    if invocation.named_run is not None:
        assert invocation.resume is not None
        named_checkpoints(invocation.resume, invocation.config)
        return
    folder = Path(output.folder).expanduser().absolute()
    if output.name is not None and invocation.resume is None:
        check_unused(RunState(folder / output.name))
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output.folder: {folder} cannot be made or written: {existing} does not allow it")


def _check_model(model: str, loading: LoadingConfig) -> None:
    if model == EMBEDDED_MODEL:
        check_embedded_model()
        return
    check_model_name(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_model_files(folder)
        return
    from huggingface_hub import try_to_load_from_cache

    try:
        there = hub.can_be_read("model", model, CONFIG, loading.revision, needed=True) or isinstance(
            try_to_load_from_cache(model, CONFIG, revision=loading.revision), str
        )
    except ValueError as error:
        raise ValueError(f"model: {model!r} is no folder here: {error}") from error
    if not there:
        raise ValueError(f"model: {model!r} is no folder here: {hub.unreachable('the model')}")


def _check_data(data: DataConfig) -> None:
    for name, source in sources_of(data).items():
        try:
            _check_source(source)
        except ValueError as error:
            if not data.mix:
                raise
            raise ValueError(f"data.mix, {name}: {error}") from error


def _check_source(data: DataConfig) -> None:
    settings = {"data.path": data.path}
    if data.eval_size and data.eval_path is not None:
        settings["data.eval_path"] = data.eval_path
    for setting, path in settings.items():
        if not check_data(path, setting, data.name if setting == "data.path" else None):
            continue
        try:
            there = hub.can_be_read("dataset", path, "README.md") or hub.has_copy_of_data(path)
        except ValueError as error:
            raise ValueError(f"{setting}: there is no file or folder {path!r} here: {error}") from error
        if not there:
            raise ValueError(f"{setting}: there is no file or folder {path!r} here: {hub.unreachable(setting)}")


def _check_trackers(output: OutputConfig, logs: bool) -> None:
    if not logs:
        return
    if output.wandb_mode != "off":
        check_extra("wandb", f"output.wandb={output.wandb_mode}")
    check_installed(output.all_trackers)
    if output.wandb_mode == "online":
        _check_wandb()


def _check_wandb() -> None:
    """Look for a key where wandb will look for it: in its environment variables, the netrc file and its settings."""
    from wandb.sdk import wandb_setup  # takes a second
    from wandb.sdk.lib import wbauth

    try:
        host = wandb_setup.singleton().settings.base_url
        found = wbauth.authenticate_session(host=host, source="sorsa_ds", prompt=False, update_session=False)
    except Exception as error:  # a key of another form, contradicting variables, a netrc file that cannot be read
        raise ValueError(f"output.wandb=online: {error}; log in anew (wandb login)") from error
    if found is None:
        raise ValueError(
            f"output.wandb=online: there is no key for {host}: log in once (wandb login), or set WANDB_API_KEY; "
            f"output.wandb=offline needs none"
        )
