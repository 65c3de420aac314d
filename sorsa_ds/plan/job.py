"""What is planned: a run's settings and the hardware, resolved as training would resolve them there."""

from dataclasses import dataclass

from sorsa_ds.config import deepspeed_json
from sorsa_ds.config.batch_size import shard_length
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.settings import check_open_micro_batch, check_settings, with_trained_tokens
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.runtime import precision
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import residual_storage
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True)
class Job:
    """A run on some hardware.

    given: the DeepSpeed JSON as the user wrote it. resolved: the same as resolved for this hardware.
    """

    config: RunConfig
    given: dict
    resolved: deepspeed_json.Resolved
    precision: Precision
    storage: Storage
    hardware: Hardware

    @classmethod
    def of(cls, config: RunConfig, given: dict, hardware: Hardware) -> "Job":
        """Resolve a run's settings for GPUs that multiply in bf16.

        Raises:
            ValueError: the settings, or the number of ranks, do not go together.
        """
        config = with_trained_tokens(config)
        wanted = deepspeed_json.precision_from_json(given)
        formats = precision.resolve_precision(config.train.precision, wanted, "cuda", fast=True)
        resolved = deepspeed_json.resolve_ds_config(
            given, config.train, hardware.ranks, "cuda", formats.name, hardware.gpus, config.data.max_length
        )
        check_settings(config, resolved.zero_stage, formats)
        if resolved.micro_choices:
            check_open_micro_batch(config)
        return cls(config, given, resolved, formats, residual_storage.storage_of(config.residual, formats), hardware)

    @property
    def zero(self) -> dict:
        """The JSON's zero_optimization section, as resolved."""
        return self.resolved.ds["zero_optimization"]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.resolved.zero_stage

    @property
    def ranks(self) -> int:
        """Number of ranks of the whole job."""
        return self.hardware.ranks

    @property
    def frozen_blocks(self) -> int:
        """Number of ranks among which ZeRO-3 cuts frozen parameters: those of a node, or all."""
        return self.zero.get("zero_hpz_partition_size", self.ranks)

    @property
    def most_examples(self) -> int:
        """The most examples of `data.max_length` tokens that take the memory of a micro-batch on one rank."""
        asked, micro = self.config.train.micro_batch_tokens, self.resolved.micro_batch_size
        if not isinstance(asked, int):
            return micro
        share = micro * self.resolved.gradient_accumulation_steps
        return min(-(-asked // self.config.data.max_length), share)

    @property
    def together(self) -> int:
        """Number of ranks that compute a micro-batch together (`train.sequence_parallel`)."""
        return self.config.train.sequence_parallel

    @property
    def length(self) -> int:
        """Positions of a sequence that one rank computes, at the longest."""
        return shard_length(self.config.data.max_length, self.together)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank, at the longest."""
        return self.most_examples * self.length

    @property
    def step_tokens(self) -> int:
        """Tokens of one rank in an optimizer step, at the longest."""
        sizes = self.resolved
        return sizes.micro_batch_size * sizes.gradient_accumulation_steps * self.length

    @property
    def uses(self) -> int:
        """How often a frozen weight is used in an optimizer step: in forward, recomputation and backward passes."""
        passes = 3 if self.config.train.gradient_checkpointing else 2
        return passes * self.resolved.gradient_accumulation_steps

    def offloaded(self, what: str) -> bool:
        """Whether `optimizer` or `param` state lives in the host's memory."""
        return f"offload_{what}" in self.zero

    def pinned(self, what: str) -> bool:
        """Whether offloaded `optimizer` or `param` state lies in page-locked memory, DeepSpeed's default."""
        return self.zero.get(f"offload_{what}", {"pin_memory": False}).get("pin_memory", True)
