"""The settings of what is watched while a run trains, and of where it writes. A field's docstring is its help text."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sorsa_ds.config.declare import Name, NonNegativeFloat, NonNegativeInt, PositiveInt, settings

if TYPE_CHECKING:
    from sorsa_ds.config.schema import DataConfig
    from sorsa_ds.config.train_settings import TrainConfig

TrackerName = Literal[
    "wandb", "tensorboard", "mlflow", "comet_ml", "trackio", "swanlab", "aim", "clearml", "dvclive"
]  # fmt: skip
"""The trackers that accelerate knows, by its names."""


@settings
class EvaluationConfig:
    """What is done with held-out data while a run trains, besides the loss every `train.eval_every` steps."""

    samples: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of held-out prompts, the first ones, that the model answers at the start, after evaluations and at the
    end: greedily, by the prompts of training. The answers go to samples.jsonl, the console and the trackers. 0: none on
    the way."""

    samples_every: PositiveInt = 1
    """Evaluations between answers; those at the start and at the end are made in any case."""

    sample_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Largest number of tokens of such an answer. Each is a forward pass, for which ZeRO-3 gathers the whole model."""

    last_answer: bool = True
    """Show the model's answer to the first held-out prompt at the end of the run, also where `samples` is 0."""

    keep_best: bool = True
    """Keep the checkpoint of the lowest held-out loss, beside the newest ones: `--checkpoint best` takes it. It is
    saved after the evaluation unless that step has a checkpoint anyway."""

    patience: NonNegativeInt = 0
    """Evaluations in a row that may fail to lower the held-out loss by more than `min_delta`; with the last of them the
    run ends. 0: it never ends early."""

    min_delta: NonNegativeFloat = 0.0
    """By how much the held-out loss, in nats per token, must fall for `patience` to begin anew."""

    def __post_init__(self) -> None:
        if self.min_delta and not self.patience:
            raise ValueError(
                f"evaluation.min_delta={self.min_delta} goes with evaluation.patience, which is 0: set that"
            )
        if self.samples_every > 1 and not self.samples:
            raise ValueError(
                f"evaluation.samples_every={self.samples_every} goes with evaluation.samples, which is 0: set that"
            )


@settings
class OutputConfig:
    """Where a run writes its files, and where it logs."""

    folder: Name = "runs"
    """Folder that holds the run folders."""

    name: Name | None = None
    """Name of the run folder, without `/`. Unset: model, method and time."""

    save_every: NonNegativeInt = 10
    """Optimizer steps between checkpoints, from which `--resume` continues. A checkpoint takes 12 bytes per trained
    parameter and is written while training goes on. One is always made at the end, on Ctrl-C, and on SIGTERM or
    SIGUSR1. 0: only these."""

    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints that are kept. Older ones are removed when a new one is complete, but for the best one
    (`evaluation.keep_best`)."""

    peft_adapter: bool = True
    """Whether `adapter/` also gets what was trained in PEFT's format, which PEFT and vLLM load as it is: with SORSA a
    LoRA of twice the rank, as large as U, s and V of the beginning and the end together. `launch/export.py` writes it
    later, too."""

    trackers: list[TrackerName] = Field(default_factory=list)
    """Experiment trackers that get what metrics.jsonl gets, several at once: `[tensorboard, mlflow]`. Each needs its
    package. Those with a server reach it by their own settings; no tracker is used that is not named here or by
    `wandb`."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Whether to log to Weights & Biases, online or into local files. `off`: only if `trackers` names it, online then.
    """

    wandb_project: str = "sorsa"
    """Name of the project on Weights & Biases, and of the project or experiment in other trackers."""

    def __post_init__(self) -> None:
        if self.name is not None and ("/" in self.name or self.name in ("", ".", "..")):
            raise ValueError(f"output.name: {self.name!r} is not the name of one folder")
        if twice := next((one for one in self.trackers if self.trackers.count(one) > 1), None):
            raise ValueError(f"output.trackers: {twice} stands there twice")

    @property
    def wandb_mode(self) -> Literal["off", "online", "offline"]:
        """How the run logs to Weights & Biases, whichever setting asks for it."""
        return "online" if self.wandb == "off" and "wandb" in self.trackers else self.wandb

    @property
    def all_trackers(self) -> list[TrackerName]:
        """Every tracker that the settings ask for, in their order."""
        beside: list[TrackerName] = ["wandb"] if self.wandb != "off" and "wandb" not in self.trackers else []
        return [*beside, *self.trackers]


def check_watched(evaluation: EvaluationConfig, train: "TrainConfig", data: "DataConfig") -> None:
    """Stop where the settings ask for something at evaluations that are not made, or cannot be.

    Raises:
        ValueError: naming both settings.
    """
    if evaluation.patience and not train.eval_every:
        raise ValueError(
            f"evaluation.patience={evaluation.patience} counts the evaluations on the way, and there are none: set "
            "train.eval_every, the steps between them"
        )
    asked = {"patience": evaluation.patience, "samples": evaluation.samples}
    name = next((name for name, value in asked.items() if value), None)
    if name is None:
        return
    if not any(size if size is not None else data.eval_size for size in [one.eval_size for one in data.mix] or [None]):
        raise ValueError(
            f"evaluation.{name}={asked[name]} needs held-out data, and data.eval_size is 0: raise it, or leave it out"
        )
    if evaluation.samples and train.sequence_parallel > 1:
        raise ValueError(
            f"evaluation.samples={evaluation.samples}: a run with train.sequence_parallel={train.sequence_parallel} "
            "cannot answer on the way, because a rank holds a share of each sequence only: set it to 0, and ask the "
            "finished run with launch/chat.py"
        )
