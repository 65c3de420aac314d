"""Right padding without an attention mask: the same logits at real positions, in every family that can be built."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.helpers.mask_bytes import mask_bytes
from benchmarks.helpers.tiny_models import WHOLE, tiny_model
from sorsa_ds.train.loss import LossOptions, summed_loss
from sorsa_ds.train.loss_options import chunks_differ
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.padding import Padding, choose_padding, model_inputs
from tests.helpers.architectures import CONFIGS
from tests.helpers.expert_models import EXPERT_CONFIGS

CPU = torch.device("cpu")
NOT_BUILT = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}
"""Families of which transformers makes no tiny model here (docs/models.md has the reasons)."""
FAMILIES = [*((name, False) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT)]
FAMILIES += [(name, True) for name in WHOLE]
NEED_THE_MASK = {("xlm", False), ("xlnet", False), ("paligemma", True), ("prophetnet", False)}
"""They see later tokens, so they see padding; the run refuses them for it. ProphetNet's logits depend on the number of
positions, with a mask as well."""
WITHOUT_CHUNKS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "ernie", "inkling2_text", "megatron-bert",
    "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Their head is a part of another module, or the model looks at what its silenced parts have computed."""


def batch_of(*lengths: int, longest: int = 23) -> dict[str, torch.Tensor]:
    """Random sequences of these lengths, padded on the right; all of it is learned but the first quarter."""
    ids = torch.randint(10, 250, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([(torch.arange(longest) < length).long() for length in lengths])
    labels = ids.where(mask.bool() & (torch.arange(longest) >= longest // 4), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def real_logits(model, ready, padding):
    """A model's logits where there is no padding."""
    with model_inputs(model, ready, padding) as inputs:
        return model(**inputs).logits[ready.attention_mask.bool()]


@pytest.mark.parametrize(("family", "whole"), FAMILIES)
def test_every_family_has_the_same_logits_and_losses_as_with_a_mask_and_with_all_logits(family, whole):
    model = tiny_model(family, whole).eval()
    padding, told = choose_padding(model, batch_of(23, 9), CPU, "fp32")
    assert (padding is Padding.MASK) == ((family, whole) in NEED_THE_MASK), told
    ready = MicroBatch.of(batch_of(48, 31, 7, longest=48))  # longer than the windows, which have 32
    wanted = real_logits(model, ready, Padding.MASK)
    gap = (real_logits(model, ready, padding) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert gap.max() < 1e-4
    why = chunks_differ(model, batch_of(23, 9), CPU, padding, "fp32")
    assert (why is not None) == (family in WITHOUT_CHUNKS or (family, whole) == ("llama4", True)), why


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "qwen3", "phi", "phi3", "gpt2"])
def test_a_model_without_windows_makes_no_mask(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    ready = MicroBatch.of(
        batch_of(23, 9) | {"input_ids": torch.randint(3, 64, (2, 23)), "labels": torch.zeros(2, 23).long()}
    )
    assert mask_bytes(model, ready, LossOptions(Padding.POSITIONS)) == 0
    assert mask_bytes(model, ready, LossOptions(Padding.MASK)) >= 2 * 23 * 23


@pytest.mark.parametrize(("longest", "made"), [(7, False), (23, True)])
def test_a_model_makes_the_mask_of_its_windows_only_beyond_them(longest, made):
    model = AutoModelForCausalLM.from_config(CONFIGS["mistral"]).eval()  # its windows have 8
    ids = torch.randint(3, 64, (2, longest))
    ready = MicroBatch.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert (mask_bytes(model, ready, LossOptions(Padding.POSITIONS)) > 0) == made


def test_padding_that_is_not_on_the_right_is_told_to_the_model():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    batch = batch_of(23, 9) | {"input_ids": torch.randint(3, 64, (2, 23))}
    left = MicroBatch.of({**batch, "attention_mask": batch["attention_mask"].flip(1), "labels": batch["input_ids"]})
    with_mask, without = (summed_loss(model, left, LossOptions(one)) for one in (Padding.MASK, Padding.POSITIONS))
    assert torch.equal(with_mask, without)


def test_a_model_that_balances_its_experts_keeps_its_mask():
    config = EXPERT_CONFIGS["mixtral"].__class__(**EXPERT_CONFIGS["mixtral"].to_dict() | {"output_router_logits": True})
    model = AutoModelForCausalLM.from_config(config)
    padding, told = choose_padding(model, batch_of(23, 9), CPU, "fp32")
    assert padding is Padding.MASK and "loss of the router" in told


def test_a_model_that_fails_without_a_mask_gets_one():
    class Strict(torch.nn.Module):
        """A model whose code takes no other call than one with a mask."""

        config = CONFIGS["llama"]

        def forward(self, input_ids, attention_mask, use_cache):
            return AutoModelForCausalLM.from_config(CONFIGS["llama"])(input_ids, attention_mask)

    padding, told = choose_padding(Strict(), batch_of(5, 2) | {"input_ids": torch.ones(2, 23).long()}, CPU, "fp32")
    assert padding is Padding.MASK and "fails (TypeError" in told
