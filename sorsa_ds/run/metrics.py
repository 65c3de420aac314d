"""metrics.jsonl: a line of JSON for each optimizer step and each evaluation of a run. Nothing heavy is imported."""

from pathlib import Path

from sorsa_ds.run.paths import METRICS
from sorsa_ds.runtime.json_text import parse_json


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; the last one is left out if a kill has cut it.

    Raises:
        ValueError: a line is not one that a run logs; the message names it.
    """
    return read_steps(folder / METRICS)


def read_steps(path: Path) -> list[dict]:
    """The lines of a file of JSON objects with a `step` each; the last one is left out if a kill has cut it.

    Raises:
        ValueError: a line is no such object; the message names it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [parse_step(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


def parse_step(line: bytes, path: Path, number: int) -> dict:
    """One line of such a file.

    Args:
        path, number: where the line stands, for the message.

    Raises:
        ValueError: it is no JSON object with a step.
    """
    try:
        read = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
    if not isinstance(read, dict) or type(read.get("step")) is not int:
        raise ValueError(f"{path}, line {number}: has no step; the file is damaged")
    return read


def is_kept(line: dict, steps_done: int, eval_every: int) -> bool:
    """Whether a line of metrics.jsonl stays when a run goes on after `steps_done` steps.

    Lines of later steps go, and so does an evaluation after that step which is made again.

    Args:
        eval_every: steps between evaluations; 0: there are none on the way.
    """
    if line["step"] == steps_done:
        measured_again = steps_done == 0 or (eval_every > 0 and steps_done % eval_every == 0)
        return "loss" in line or not measured_again
    return line["step"] < steps_done
