"""What libraries would fetch or tell over the network although nobody has asked them to: off in every command."""

import os

_OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # else a list of agents is fetched, even where a folder is read
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` tells the hub of every file that it opens
    "USE_HUB_KERNELS": "NO",  # transformers takes kernels, which are code, from the hub for some architectures
    "WANDB_ERROR_REPORTING": "false",  # wandb tells its makers where it fails, also when it is offline
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow tells its makers how it is used, also when it logs to a folder
    "DVC_NO_ANALYTICS": "true",  # so does DVC
}
"""Environment variable -> the value that turns it off."""


def turn_off_telemetry() -> None:
    """Set the variables, unless the user has: before the libraries are imported, because they look only then."""
    for name, value in _OFF.items():
        os.environ.setdefault(name, value)
