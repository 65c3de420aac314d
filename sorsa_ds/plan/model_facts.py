"""The model that a job would train, from its configuration alone: every parameter, and what a forward pass keeps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.experts import Stack, find_stacks
from sorsa_ds.model.new_tokens import grow_tables, new_token_ids, rows_for, table_rows
from sorsa_ds.model.packed_attention import balances_by_mask, check_packing, makes_common_masks
from sorsa_ds.model.selection import Selection
from sorsa_ds.model.sequence_parallel import check_model
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.tokenizer import NoTokenizer
from sorsa_ds.model.whole_modules import WholeParameter
from sorsa_ds.plan.activations import Kept, kept_for_backward
from sorsa_ds.plan.exchange import Exchanged, head_width
from sorsa_ds.plan.gathering import Gathers, gathers
from sorsa_ds.plan.job import Job

Kind = Literal["residual", "frozen", "trained"]


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter as a rank's model holds it: W_r or a part of it, another frozen one, or one that is trained."""

    kind: Kind
    numel: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.numel * self.itemsize

    def block(self, ranks: int) -> int:
        """Numbers in one of the equal flat blocks into which ZeRO-3 cuts it."""
        return -(-self.numel // ranks)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear with a weight (m, n), or the linears of all experts of a layer that the model holds as one parameter.

    rank: the rank of the adapter beside it; 0 without one.
    trained: whether its whole weight is trained.
    head: whether it gives the logits.
    experts: how many matrices (m, n) the parameter holds; 0: a linear.
    """

    m: int
    n: int
    rank: int
    trained: bool
    head: bool
    experts: int = 0

    @property
    def matrices(self) -> int:
        """How many matrices there are: one, or one of each expert."""
        return max(1, self.experts)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan needs of the model.

    parameters: every parameter; tied ones stand there once.
    selection: what is adapted, as `methods.method.Method.operation` gives it; nothing where everything is trained.
    linears: every linear, adapted or not.
    gathers: what ZeRO-3 gathers together.
    kept: what a forward pass of one micro-batch keeps for backward.
    attention: numbers in one token's queries, of all heads of a block together; 0 without attention.
    exchanged: what attention exchanges among the ranks that share a sequence.
    vocabulary: number of tokens.
    """

    parameters: list[Held]
    selection: Selection
    linears: list[Linear]
    gathers: Gathers
    kept: Kept
    attention: int
    exchanged: Exchanged
    vocabulary: int

    @property
    def targets(self) -> list[Target]:
        """The linears that are adapted."""
        return self.selection.targets

    @property
    def whole(self) -> list[WholeParameter]:
        """The parameters that are trained whole beside the adapters."""
        return self.selection.whole

    @property
    def trainable(self) -> int:
        """Number of trained parameters; with SORSA those of U, s and V."""
        return sum(p.numel for p in self.parameters if p.kind == "trained")

    @property
    def frozen(self) -> int:
        """Number of pre-trained weights that are not trained, however they are stored."""
        others = sum(p.numel for p in self.parameters if p.kind == "frozen")
        packed = any(p.kind == "residual" for p in self.parameters)
        return others + (sum(target.numel for target in self.targets) if packed else 0)

    @property
    def largest(self) -> int:
        """Numbers of the largest pre-trained parameter, however it is stored."""
        return max(*(p.numel for p in self.parameters), *(target.numel for target in self.targets), 0)

    @property
    def largest_whole(self) -> int:
        """Numbers in the largest of the parameters that are trained whole beside the adapters."""
        return max((one.numel for one in self.whole), default=0)

    @property
    def widest(self) -> int:
        """The most numbers that a token has on one side of a linear beside the head, in all of its rows."""
        return max(self.rows(linear) * max(linear.m, linear.n) for linear in self.linears if not linear.head)

    def rows(self, linear: Linear) -> int:
        """How many rows each token has in a linear: one, or one in each of its experts."""
        return self.kept.routed if linear.experts else 1


@dataclass(frozen=True, slots=True)
class BareModel:
    """The model that a job would train, without memory for its parameters. Its fields are those of `Facts`.

    stacks: the experts that it holds as one parameter, adapted or not.
    """

    model: PreTrainedModel
    parameters: list[Held]
    selection: Selection
    linears: list[Linear]
    gathers: Gathers
    stacks: list[Stack]

    def facts(self, job: Job) -> Facts:
        """What a plan needs of it, for the micro-batch of the job. The job's other settings are those of the model."""
        text = self.model.config.get_text_config()
        autocast = torch.bfloat16 if job.precision.name == "mixed" else None
        micro, length = job.most_examples, job.length
        # A run finds out on the model itself whether it needs a mask; nearly all that make it in the common way do not.
        masked = job.config.data.packing or not makes_common_masks(self.model) or balances_by_mask(self.model)
        kept = kept_for_backward(self.model, micro, length, _dtype(self.model), autocast, self.stacks, masked)
        return Facts(
            parameters=self.parameters,
            selection=self.selection,
            linears=self.linears,
            gathers=self.gathers,
            kept=kept,
            attention=_attention(text),
            exchanged=Exchanged.of(text, job.together),
            vocabulary=text.vocab_size,
        )


def bare_model(folder: Path, job: Job, check: Callable[[PreTrainedModel], object] | None = None) -> BareModel:
    """Build the job's model without memory for its parameters, which takes seconds.

    Args:
        folder: has the model's config.json; weights are not needed.
        check: is given the model before its layers are replaced.

    Raises:
        ValueError: the model is not a causal language model, lacks a target, has no room for a rank, or cannot be
            trained on packed examples, or on shards of sequences, where that is asked for.
    """
    model = skeleton(folder, job.config.loading, job.precision.residual_dtype)
    if check is not None:
        check(model)
    if job.config.data.packing:
        check_packing(model)
    check_model(model, job.together, job.config.data.max_length)
    grow_tables(model, _rows(folder, job, model))
    cast(nn.Module, model).to("meta")  # the decorator of transformers' own `to` hides its arguments' types
    head = model.get_output_embeddings()
    stacks, _ = find_stacks(model)
    method = method_of(job.config)
    selection, _ = method.operation(job.config, job.precision, job.storage, torch.device("meta"))(model)
    targets = selection.targets
    residuals = {name for target in targets for name in method.residual_names(target, job.storage)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name not in residuals and parameter.is_floating_point():
            parameter.data = parameter.data.to(job.precision.residual_dtype)
    parameters = [
        Held("trained" if p.requires_grad else "residual" if name in residuals else "frozen", p.numel(), p.itemsize)
        for name, p in model.named_parameters()
    ]
    ranks = {t.name: (t, method.rank(t, job.config.baseline)) for t in targets}
    linears = [*_linears(model, ranks, head), *_experts(model, ranks, stacks)]
    return BareModel(model, parameters, selection, linears, gathers(model, stacks), stacks)


def _rows(folder: Path, job: Job, model: PreTrainedModel) -> int:
    """Rows that new tokens need; where the folder has no tokenizer, one more than the model has for each of them.

    Raises:
        ValueError: the tokenizer knows one of them already.
    """
    tokens = job.config.data.new_tokens
    try:
        return rows_for(new_token_ids(folder, job.config.loading, tokens))
    except NoTokenizer:
        return table_rows(model) + len(tokens)


def facts(folder: Path, job: Job) -> Facts:
    """What a plan needs of the job's model, which is built for it.

    Raises:
        ValueError: the model is not a causal language model, or the settings do not fit it (see `bare_model`).
    """
    return bare_model(folder, job).facts(job)


def _linears(model: nn.Module, targets: dict[str, tuple[Target, int]], head: nn.Module | None) -> list[Linear]:
    """Every linear of an operated model without its stacked experts; a linear and its adapter are counted as one.

    Args:
        targets: name -> (target, rank of its adapter).
    """
    found: list[Linear] = []
    adapters: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapters):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            m, n = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            found.append(Linear(m, n, 0, module.weight.requires_grad, module is head))
        elif name in targets and not targets[name][0].experts:
            target, rank = targets[name]
            found.append(Linear(target.out_features, target.in_features, rank, False, module is head))
            adapters = (f"{name}.",)  # its parts follow
    return found


def _experts(model: nn.Module, targets: dict[str, tuple[Target, int]], stacks: list[Stack]) -> Iterator[Linear]:
    """The stacked experts of an operated model.

    Args:
        targets: name -> (target, rank of its adapter).
        stacks: the model's stacked experts as they were before the operation.
    """
    for stack in stacks:
        _, rank = targets.get(stack.name, (None, 0))
        trained = rank == 0 and model.get_parameter(stack.name).requires_grad
        yield Linear(stack.out_features, stack.in_features, rank, trained, False, stack.experts)


def _attention(config: PreTrainedConfig) -> int:
    return (getattr(config, "num_attention_heads", None) or 0) * head_width(config)


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return cast(nn.Embedding, model.get_input_embeddings()).weight.dtype
