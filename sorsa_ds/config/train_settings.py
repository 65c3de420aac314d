"""The settings of training itself: steps, batches, rate, precision, loss. A field's docstring is its help text."""

from typing import Annotated, Literal

from pydantic import Field

from sorsa_ds.config.declare import (
    BatchSize,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    settings,
)
from sorsa_ds.config.schedules import ScheduleName, check_schedule


@settings
class TrainConfig:
    """How the model is trained: with AdamW, and these schedule, batch sizes and precision."""

    steps: PositiveInt | None = None
    """Number of optimizer steps. Unset: as many as `epochs` make."""

    epochs: PositiveFloat = 1.0
    """Passes over the data, where `steps` is unset."""

    global_batch_size: BatchSize | None = None
    """Examples per optimizer step, over all ranks and accumulation steps (JSON: train_batch_size). Unset: micro-batch x
    ranks x accumulation."""

    micro_batch_size: BatchSize | Literal["auto"] | None = None
    """Examples per forward pass of one rank (JSON: train_micro_batch_size_per_gpu). Unset: 2. `auto`: the largest that
    fits into the memory by the plan; the global batch stays what it is without."""

    micro_batch_tokens: Annotated[int, Field(ge=8, le=10**9)] | Literal["auto"] | None = None
    """Micro-batches of as many positions instead of as many examples, so that ranks wait less for one another: the
    largest number of positions (examples x the longest, padding included) of a forward pass of one rank. A number is at
    least `data.max_length`, and `micro_batch_size` follows from it. `auto`: `micro_batch_size` x `data.max_length`.
    Unset: `micro_batch_size` examples."""

    sequence_parallel: Annotated[int, Field(ge=1, le=4096)] = 1
    """Consecutive ranks that compute one micro-batch together, each its share of the positions of every sequence, by
    DeepSpeed's Ulysses: for sequences that are too long for one GPU (docs/long_context.md). It divides the number of
    ranks and the model's attention heads."""

    gradient_accumulation_steps: BatchSize | None = None
    """Forward passes of a rank per optimizer step; with packing or `micro_batch_tokens` the most that there can be.
    Unset: what follows from the two batch sizes, else 1."""

    gradient_clipping: NonNegativeFloat | None = None
    """Largest norm of the training loss's gradient. The regulariser's gradient is not clipped. 0: no clipping. Unset:
    1.0."""

    learning_rate: PositiveFloat | Literal["auto"] = 2e-4
    """The largest learning rate of the schedule, eta_d. `auto`, with `method=sorsa`: from the singular values that are
    trained, so that a step moves an entry of the weights about equally far in any model (docs/choosing.md)."""

    warmup_ratio: Fraction = 0.03
    """Fraction of the steps in which the learning rate rises linearly from 0, or from its floor with
    `warmup_stable_decay`."""

    schedule: ScheduleName = "cosine"
    """How the learning rate goes after the warm-up, by the names of transformers' `lr_scheduler_type`. `cosine` and
    `linear` fall to 0. `constant` has no warm-up, `constant_with_warmup` has. `cosine_with_min_lr` falls to
    `min_lr_ratio`. `warmup_stable_decay` stays at the top, then falls in the last steps by half a cosine."""

    min_lr_ratio: Fraction = 0.0
    """Where `cosine_with_min_lr` and `warmup_stable_decay` end, as a fraction of `learning_rate`."""

    decay_ratio: Fraction = 0.1
    """Fraction of the steps, the last ones, in which `warmup_stable_decay` falls."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw`: PyTorch's fused AdamW, 8 bytes of moments per trained number. `adamw_8bit`: bitsandbytes' with 2 bytes,
    over the same fp32 masters; on CPUs it takes thirty times as long, and a GPU is waited for after each of them."""

    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay on the trained parameters."""

    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""

    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's epsilon."""

    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass. Takes about a third more time and far less memory."""

    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto"
    """fp32: everything in fp32. mixed: fp32 factors over a bf16 residual, under bf16 autocast (as in the papers).
    bf16: DeepSpeed's bf16 engine with fp32 masters. `auto`: mixed where bf16 products are fast, else fp32."""

    label_smoothing: Fraction = 0.0
    """Share of each learned token's probability that is spread over the whole vocabulary, as transformers'
    `label_smoothing_factor`. The held-out loss is without it."""

    neftune_noise_alpha: PositiveFloat | None = None
    """NEFTune: uniform noise on the embeddings in training, of at most this / sqrt(positions of a row x width), as
    transformers adds it. Not with `sequence_parallel`, where a row's positions are on several ranks. Unset: none."""

    loss_chunk: Literal["auto"] | NonNegativeInt = "auto"
    """Learned positions whose logits exist at once. `auto`: all of them where the logits of a micro-batch take at most
    1 GiB, else as many as take that. 0: all of them. The losses are the same but for rounding."""

    compile: Literal["auto", "off"] = "off"
    """`auto`: compile the model's blocks by torch.compile where that works and gives the same loss and gradients; a run
    says what it found. It takes minutes at the start. Not under ZeRO-3 and with `sequence_parallel`."""

    check_memory: bool = True
    """Estimate the run's memory before the model is loaded, report it, and stop if it cannot fit (as launch/plan.py
    does without running anything)."""

    eval_every: NonNegativeInt = 0
    """Optimizer steps between held-out evaluations. The start and the end are always evaluated. 0: only these two."""

    profile_steps: Annotated[int, Field(ge=0, le=100)] = 0
    """Number of steps, from the fourth of a job on, of which metrics.jsonl also has the seconds of each part on rank 0:
    data, forward, backward, step, rest, and collectives meanwhile. 0: none."""

    profile_trace: bool = False
    """Write a Chrome trace of each profiled step of rank 0 into the run's folder, profile/. These steps take longer."""

    seed: Seed = 0
    """Seed of the data order, the held-out rows, the generated data and the dropout."""

    deterministic: bool = False
    """Take only kernels that give the same bits in every run on the same hardware (docs/reproducibility.md). On a GPU
    it costs time; on CPUs nothing."""

    timeout_minutes: Annotated[float, Field(gt=0, le=30 * 24 * 60)] = 10.0
    """Minutes that a rank waits for the others, at the start and in every exchange, before it ends with a message."""

    max_start_gap: PositiveFloat | None = None
    """Largest relative gap between the adapted model's loss at step 0 and the base model's. A larger gap stops the run.
    Unset: 0.02, or 0.5 with a 4-bit residual, which loses some of the model's quality."""

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, which is a number from the moment on at which the model is loaded."""
        assert self.learning_rate != "auto", "the rate is asked for before it is known"
        return self.learning_rate

    def __post_init__(self) -> None:
        check_schedule(self)
        if self.profile_trace and not self.profile_steps:
            raise ValueError("train.profile_trace writes a trace of each of train.profile_steps, which is 0: set that")
