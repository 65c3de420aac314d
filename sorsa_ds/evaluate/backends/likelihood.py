"""How likely given tokens are to a model: log-probabilities of the next token, and the loss of a text.

Sequences are padded on the right, where no token before can attend to it: what is measured depends on the batch by
rounding alone.
Shapes: B sequences, L positions, K scored positions, C vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.data.batches import collate
from sorsa_ds.data.tokenize import IGNORED, Example


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of the labelled tokens of a batch.

    logits_KC: in the dtype in which the model gives them. labels_K: the tokens. places_BL: where in the batch they are,
    with L one less than the batch's length, because the first token has nothing to predict it from.
    """

    logits_KC: Tensor
    labels_K: Tensor
    places_BL: Tensor

    def per_sequence(self, values_K: Tensor) -> list[float]:
        """Sums of one value per labelled token over each sequence, in float64."""
        values_BL = torch.zeros(self.places_BL.shape, dtype=torch.float64, device=values_K.device)
        values_BL[self.places_BL] = values_K.double()
        return values_BL.sum(1).tolist()

    def counts(self) -> list[int]:
        """How many labelled tokens each sequence has."""
        return self.places_BL.sum(1).tolist()


class Likelihood:
    """Measures with one model on this rank's device.

    Args:
        pad: id of the token that fills a batch up; no result depends on it.
        autocast: compute products in bf16 though parameters are wider, as training does with precision `mixed`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, pad: int, autocast: bool = False):
        self._model, self._device, self._pad, self._autocast = model, device, pad, autocast

    @torch.inference_mode()
    def next_token(self, sequences: Sequence[Example]) -> list[Tensor]:
        """Log-probabilities of the token that follows each sequence: a tensor (C,) per sequence, float32 on the CPU."""
        batch = self._batch(sequences)
        last_B = batch["attention_mask"].sum(1) - 1
        rows_B = torch.arange(len(sequences), device=self._device)
        return list(self._logits(batch)[rows_B, last_B].float().log_softmax(-1).cpu())

    @torch.inference_mode()
    def losses(self, sequences: Sequence[Example]) -> list[tuple[float, int]]:
        """For each sequence (loss in nats, summed over the labelled tokens; number of these tokens)."""
        scored = self.scored(sequences)
        nats_K = torch.nn.functional.cross_entropy(scored.logits_KC.float(), scored.labels_K, reduction="none")
        return list(zip(scored.per_sequence(nats_K), scored.counts(), strict=True))

    @torch.inference_mode()
    def scored(self, sequences: Sequence[Example]) -> Scored:
        """The logits of each labelled token."""
        batch = self._batch(sequences)
        labels_BL = batch["labels"][:, 1:]
        places_BL = labels_BL != IGNORED
        return Scored(self._logits(batch)[:, :-1][places_BL], labels_BL[places_BL], places_BL)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model tells apart, C."""
        return self._model.config.get_text_config().vocab_size

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        with self._products():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return self._model(**inputs, use_cache=False).logits

    def _products(self) -> AbstractContextManager:
        return torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()

    def _batch(self, sequences: Sequence[Example]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in collate(sequences, self._pad).items()}


def batch_by_length(sequences: Sequence[tuple[str, int]], size: int) -> list[list[str]]:
    """Batches of ids, made from pairs of id and length: similar lengths together, the longest first."""
    ordered = [id_ for id_, length in sorted(sequences, key=lambda entry: (-entry[1], entry[0]))]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
