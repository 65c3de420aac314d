"""A model that sees the tokens that it is to predict is refused before the first step."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, XLMConfig

from sorsa_ds.train.start_check import check_causal

CPU = torch.device("cpu")
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    """Examples of these lengths, padded on the right."""
    mask = torch.stack([(torch.arange(40) < length).long() for length in lengths])
    ids = torch.randint(5, 50, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def built(config):
    """A random model in training mode, of which every part moves the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def xlm(causal: bool):
    """A model of a class that is causal only if its configuration says so."""
    return built(XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2, causal=causal))


@pytest.mark.parametrize("lengths", [(40, 7), (0, 2), (0, 0), (1, 3)])
def test_a_causal_model_passes_with_any_examples(lengths):
    model = built(LlamaConfig(**SMALL))
    check_causal(model, batch(*lengths), CPU)
    assert model.training
    check_causal(xlm(causal=True), batch(*lengths), CPU)


@pytest.mark.parametrize("lengths", [(40, 7), (5, 9)])
def test_a_model_that_looks_ahead_is_refused(lengths):
    with pytest.raises(ValueError, match="XLMWithLMHeadModel sees the tokens that it is to predict"):
        check_causal(xlm(causal=False), batch(*lengths), CPU)
