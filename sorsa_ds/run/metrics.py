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
        ValueError: the line is no JSON object with a step.
    """
    try:
        read = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
    if not isinstance(read, dict) or type(read.get("step")) is not int:
        raise ValueError(f"{path}, line {number}: has no step; the file is damaged")
    return read


def is_kept(line: dict, steps_done: int, made_again: bool) -> bool:
    """Whether a line of metrics.jsonl or samples.jsonl stays when a run goes on after `steps_done` steps.

    Lines of later steps go, and so does what was measured or answered after that step and is made again.

    Args:
        made_again: whether the run, as it goes on, measures or answers after `steps_done` steps once more.
    """
    if line["step"] == steps_done:
        return "loss" in line or not made_again
    return line["step"] < steps_done


def is_evaluated_again(step: int, eval_every: int, last: int) -> bool:
    """Whether a run that goes on from the checkpoint of a step evaluates after that step once more.

    Args:
        eval_every: steps between evaluations; 0: there are none on the way.
        last: the run's last step, as it goes on.
    """
    return step >= last or (eval_every > 0 and step > 0 and step % eval_every == 0)


def is_asked_again(step: int, eval_every: int, samples_every: int, last: int) -> bool:
    """Like `is_evaluated_again`, of the answers that are asked for at every so many evaluations and at the end.

    Args:
        samples_every: evaluations between answers, 1 or more; 0: there are none on the way.
    """
    due = samples_every > 0 and eval_every > 0 and step // eval_every % samples_every == 0
    return step >= last or (due and is_evaluated_again(step, eval_every, last))
