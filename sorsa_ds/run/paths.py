"""What a run's folder holds.

config.yaml, ds_config.json    all settings as resolved
ds_config.given.json           the DeepSpeed JSON as it was given
init.json                      how every layer was decomposed
metrics.jsonl                  one line per optimizer step or evaluation
samples.jsonl                  what the model answered to held-out prompts on the way and at the end (`run.samples`)
trackers.json                  by which names experiment trackers know the run, if any are asked for (`run.trackers`)
checkpoints/                   states from which the run can go on (`run.checkpoint`)
analysis/                      snapshots of the trained tensors, if asked for (`run.snapshots`)
adapter/                       the trained factors, the initial ones, their description (`model.adapter_file`); what was
                               trained in PEFT's format (`run.peft_files`); the chat template of the training where it
                               is not the tokenizer's own; in tokenizer/ the tokenizer with the new tokens, where there
                               are any
profile/                       traces of single steps, if asked for (`train.step_meter`)
report.json, loss.png          what the run measured of itself, written at its end
report.html                    the same to look at, with its curves and answers (`run.html_report`)
ended.json                     why a run that has no report came to its end, where it could still say so
evaluation/                    results of evaluations (`evaluate.command`)
"""

from pathlib import Path

METRICS, INIT, REPORT, ADAPTER, CHECKPOINTS = "metrics.jsonl", "init.json", "report.json", "adapter", "checkpoints"
SNAPSHOTS, PROFILE = "analysis", "profile"
SAMPLES, TRACKERS, ENDED = "samples.jsonl", "trackers.json", "ended.json"
PAGE, PICTURE = "report.html", "loss.png"
CHAT_TEMPLATE = "chat_template.jinja"
"""The file of a chat template in an adapter's folder; transformers looks for that name beside a tokenizer."""
TOKENIZER = "tokenizer"
"""The folder, within an adapter's, of the tokenizer of a run that has brought new tokens."""
CONFIG, DS_CONFIG, GIVEN_DS_CONFIG = "config.yaml", "ds_config.json", "ds_config.given.json"
AUTO = "auto"
"""What --resume says where the program is to find the run itself."""


def run_of(path: Path) -> Path:
    """The folder of a run, from that folder or from the folder of one of its checkpoints."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def named_run(request: str | None) -> Path | None:
    """The absolute folder of the run that --resume names; None without --resume, and where it says `auto`."""
    return run_of(Path(request).expanduser().absolute()) if request and request != AUTO else None
