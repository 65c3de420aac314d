"""How far a tuned model has moved from its base model on given texts: KL(base || tuned), and the losses of both.

The divergence of a token's distribution is summed over the whole vocabulary, in float64, from the logits as the models
give them. Both models lie in memory; beside them there are the logits of one batch twice, in the models' dtype.
Shapes: K scored tokens, C vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sorsa_ds.data.tokenize import Example
from sorsa_ds.evaluate.backends.likelihood import Likelihood

_NUMBERS_AT_ONCE = 2**22
"""How many logits are turned into float64 at once: 32 MiB, of which some ten copies are alive together."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """What was measured of one sequence, each summed over its scored tokens, in nats.

    kl: KL(base || tuned). base_nats, nats: −log p of the tokens under the base model and under the tuned one. scored:
    how many tokens.
    """

    kl: float
    base_nats: float
    nats: float
    scored: int


@torch.inference_mode()
def divergences(base: Likelihood, tuned: Likelihood, sequences: Sequence[Example]) -> list[Divergence]:
    """Measure two models with one vocabulary on the same sequences."""
    of_base, of_tuned = base.scored(sequences), tuned.scored(sequences)
    rows = max(1, _NUMBERS_AT_ONCE // of_base.logits_KC.shape[-1])
    parts = [
        _measured(*part)
        for part in zip(
            of_base.logits_KC.split(rows), of_tuned.logits_KC.split(rows), of_base.labels_K.split(rows), strict=True
        )
    ]
    columns = (of_base.per_sequence(torch.cat(column)) for column in zip(*parts, strict=True))
    return [Divergence(*row) for row in zip(*columns, of_base.counts(), strict=True)]


def _measured(base_KC: Tensor, tuned_KC: Tensor, labels_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(KL(base || tuned), −log p of the base model, −log p of the tuned one), each (K,) in float64."""
    base_KC, tuned_KC = base_KC.double().log_softmax(-1), tuned_KC.double().log_softmax(-1)
    terms_KC = base_KC.exp() * (base_KC - tuned_KC)
    # A token that the base model never writes adds nothing, however unlikely the tuned model holds it: 0 · ∞.
    kl_K = torch.where(base_KC == -torch.inf, 0.0, terms_KC).sum(-1)
    base_K, tuned_K = (-log_KC.gather(-1, labels_K[:, None])[:, 0] for log_KC in (base_KC, tuned_KC))
    return kl_K, base_K, tuned_K
