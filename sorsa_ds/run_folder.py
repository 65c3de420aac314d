"""The folder of one run, and everything that is logged into it; written by rank 0 alone.

config.yaml, ds_config.json    all settings as resolved
metrics.jsonl                  one line an optimizer step or evaluation
adapter/                       the trained factors, the initial ones, and their description
report.json, loss.png          at the end
"""

import json
import re
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from sorsa_ds import comm
from sorsa_ds.config import OutputConfig, RunConfig
from sorsa_ds.config_io import to_yaml
from sorsa_ds.files import write_json, write_text

METRICS, REPORT, ADAPTER = "metrics.jsonl", "report.json", "adapter"


def choose_folder(output: OutputConfig, model: str, device: torch.device) -> Path:
    """Make the folder of a new run, the same on every rank. A collective call.

    Raises:
        ValueError: a folder of that name holds a run already, or it cannot be written.
    """
    model_name = re.sub(r"[^\w.-]", "-", model.rstrip("/").rpartition("/")[2])
    proposal = [output.name or f"{model_name}-sorsa-{time.strftime('%Y%m%d-%H%M%S')}"]
    if comm.world_size() > 1:
        dist.broadcast_object_list(proposal, src=0)
    folder = Path(output.folder).expanduser().resolve() / proposal[0]
    error = None
    if comm.rank() == 0:
        try:
            if (folder / METRICS).exists():
                raise ValueError(f"output.name: {folder} holds a run already; choose another name, or remove it")
            write_text(folder / METRICS, "")
        except ValueError as caught:
            error = caught
    comm.agree(error, device)
    return folder


class RunLog:
    """Metrics to metrics.jsonl and, if asked, to Weights & Biases. On ranks other than 0 it does nothing."""

    def __init__(self, folder: Path, config: RunConfig, ds_config: dict, initialisation: dict):
        self.folder = folder
        self._file = self._wandb = None
        if comm.rank() != 0:
            return
        write_text(folder / "config.yaml", to_yaml(config))
        write_json(folder / "ds_config.json", ds_config)
        write_json(folder / "init.json", initialisation)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if config.output.wandb != "off":
            import wandb

            self._wandb = wandb.init(
                project=config.output.wandb_project,
                name=folder.name,
                dir=folder,
                mode=config.output.wandb,
                config=asdict(config),
            )

    def write(self, step: int, **values: float | None) -> None:
        """Log one line; `step` counts finished optimizer steps. Values that are None are left out."""
        if self._file is None:
            return
        values = {key: value for key, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self, report: dict) -> None:
        """Write the final report and end the logs."""
        if self._file is None:
            return
        self._file.close()
        write_json(self.folder / REPORT, report)
        if self._wandb is not None:
            self._wandb.summary.update(report)
            self._wandb.finish()


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
