"""The rules of keys about what a run writes: evaluations, checkpoints, trackers, its name."""

from typing import Any, get_args

from sorsa_ds.config.conversion.result import Conversion, Rule, is_on, names_of
from sorsa_ds.config.watch_settings import TrackerName


def every(path: str, strategy: str) -> Rule:
    """The rule of a number of steps between two evaluations or checkpoints."""

    def rule(made: Conversion, key: str, value: Any) -> None:
        how = str(made.keys.get(f"{strategy}_strategy", "steps")).lower()
        if key.endswith("_strategy"):
            if how in ("no", "false"):
                made.set(path, 0, key)
            elif how != "steps":
                made.leave(key, f"{path} counts optimizer steps")
        elif "per_epoch" in key or not isinstance(value, int) or isinstance(value, bool):
            made.leave(key, f"{path} counts optimizer steps")
        elif how == "steps":
            made.set(path, value, key)
        else:
            made.leave(key, f"{strategy}_strategy={how} says it")

    return rule


def timeout(made: Conversion, key: str, value: Any) -> None:
    """Seconds there, minutes here, at most thirty days."""
    made.set("train.timeout_minutes", min(float(value) / 60, 30.0 * 24 * 60), key)


def tracker(made: Conversion, key: str, value: Any) -> None:
    """Which trackers get the log."""
    asked = [name.lower() for name in names_of(value)]
    if asked == ["none"]:
        made.unset.append(key)
        return
    if key == "wandb_mode" and asked == ["offline"]:
        made.set("output.wandb", "offline", key)
    elif "wandb" in asked or asked == ["online"] or (is_on(value) and key == "use_wandb"):
        made.set("output.wandb", "online", key)
    known = [name for name in asked if name in get_args(TrackerName) and name != "wandb"]
    if known:
        made.set("output.trackers", known, key)
    if others := [name for name in asked if name not in (*known, "wandb", "online", "offline", "true")]:
        made.leave(key, f"{', '.join(others)}: metrics.jsonl in the run's folder has everything")


def best(made: Conversion, key: str, value: Any) -> None:
    """Whether the best checkpoint is kept, which is so here unless it is switched off."""
    if is_on(value):
        made.set(
            "evaluation.keep_best", True, key,
            "adapter/ of the run stays that of its last step; `sorsa export --checkpoint best` writes the best one",
        )  # fmt: skip
    else:
        made.leave(
            key, "evaluation.keep_best keeps the best checkpoint beside the newest ones, also where nothing asks"
        )


def project(made: Conversion, key: str, value: Any) -> None:
    """A project of Weights & Biases, which switches the log to it on."""
    if key != "wandb_project":
        made.leave(key, "output.wandb_project is the project of Weights & Biases")
        return
    made.set("output.wandb_project", str(value), key)
    if made.value("output.wandb") is None:
        made.set("output.wandb", "online", key)


def run_name(made: Conversion, key: str, value: Any) -> None:
    """The name of the run's folder, which the first key that has one says."""
    if made.value("output.name") is None:
        made.set("output.name", str(value).replace("/", "-"), key)
    else:
        made.leave(key, f"output.name is that of {made.settings['output.name'][1]}")


RULES: dict[str, Rule] = {
    "train.eval_every": every("train.eval_every", "eval"),
    "train.timeout_minutes": timeout,
    "output.name": run_name,
    "output.save_every": every("output.save_every", "save"),
    "output.trackers": tracker,
    "output.wandb": tracker,
    "evaluation.keep_best": best,
    "output.wandb_project": project,
}
"""Setting -> the rule of the keys that it stands for."""
