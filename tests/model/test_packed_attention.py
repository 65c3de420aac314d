"""Packed rows on many architectures: losses and gradients are those of the examples alone, or the model is refused."""

from collections import defaultdict
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import modeling_flash_attention_utils

from benchmarks.helpers.packed_loss import FAMILIES, config_of, differences, made_up, model_of
from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.data.packing import Packing, collate_packed
from sorsa_ds.model.packed_attention import check_packing, joins_rows
from sorsa_ds.train.loss import summed_loss

ONLY_EAGER = {"gemma2", "gpt_oss", "gptj", "gpt_neo"}
KERNELS = [(family, kernel) for family in FAMILIES for kernel in ("sdpa", "eager")
           if kernel == "eager" or family not in ONLY_EAGER]  # fmt: skip


@pytest.mark.parametrize(("family", "kernel"), KERNELS)
def test_a_packed_rows_loss_and_gradient_are_those_of_its_examples_alone(family, kernel):
    model = model_of(config_of(family), kernel)
    check_packing(model)
    loss, gradient = differences(model)
    assert loss < 1e-6
    assert gradient < 5e-6


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "falcon"])
def test_without_the_masks_some_models_look_over_the_seams(family, monkeypatch):
    """Why the masks are made here: these models do not hand their positions on to transformers' own masks."""
    model = model_of(config_of(family))
    monkeypatch.setattr("sorsa_ds.train.padding.packed_attention", lambda model, positions: {
        "position_ids": positions, "attention_mask": None,
    })  # fmt: skip
    assert differences(model)[1] > 0.01


@pytest.mark.parametrize(
    ("what", "changed"), [("position_ids", torch.arange(46)[None]), ("labels", None), ("input_ids", None)]
)
def test_positions_seams_and_order_of_a_row_matter(what, changed):
    """A row that is put together wrongly has another loss: the comparisons above would see it."""
    model = model_of(config_of("llama"))
    row = collate_packed([made_up((9, 14, 2, 21))], 0)
    other = {**row, what: row[what].flip(-1) if changed is None else changed}
    assert summed_loss(model, other).item() != pytest.approx(summed_loss(model, row).item(), rel=1e-3)


RECURRENT = {
    "mamba": dict(state_size=4),
    "rwkv": dict(attention_hidden_size=40, context_length=64),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "minimax": dict(layer_types=["linear_attention", "full_attention"], num_local_experts=2, head_dim=12),
    "jamba": dict(num_experts=2, mamba_d_state=4),
    "recurrent_gemma": dict(lru_width=40, attention_window_size=6, head_dim=12),
    "qwen3_next": dict(
        head_dim=12, layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4,
    ),
    "falcon_h1": dict(mamba_d_ssm=40, mamba_n_heads=4, mamba_d_head=10, mamba_d_state=4, mamba_n_groups=1),
}  # fmt: skip
OTHERS = {
    "falcon": (dict(alibi=True), "FalconForCausalLM counts its positions (ALiBi) over the whole row"),
    "bloom": (dict(n_layer=2, n_head=4), "BloomForCausalLM takes no positions (position_ids)"),
    "openai-gpt": (dict(n_embd=40, n_layer=2, n_head=4), "OpenAIGPTLMHeadModel does not make its attention masks as"),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_and_hybrid_models_are_refused(family):
    model = model_of(config_of(family, **RECURRENT[family]))
    with pytest.raises(ValueError, match=r"^data\.packing: \w+ .*carr(y|ies) a state from token to token") as refusal:
        check_packing(model)
    assert str(refusal.value).endswith("set data.packing=false (examples of similar length share a micro-batch then)")


@pytest.mark.parametrize("family", ["minimax", "lfm2", "jamba"])
def test_what_is_refused_would_mix_the_examples(family):
    assert differences(model_of(config_of(family, **RECURRENT[family])))[1] > 0.01


@pytest.mark.parametrize("family", OTHERS)
def test_models_whose_positions_or_masks_are_their_own_are_refused(family):
    fields, why = OTHERS[family]
    with pytest.raises(ValueError) as refusal:
        check_packing(model_of(config_of(family, **fields)))
    assert str(refusal.value).startswith(f"data.packing: {why}")


def test_convolutions_are_refused_by_their_modules():
    model = model_of(config_of("llama"))
    model.model.layers[1].mixer = nn.Conv1d(40, 40, 4)
    with pytest.raises(ValueError, match="LlamaForCausalLM mixes neighbouring tokens by a convolution"):
        check_packing(model)


class Kernels:
    """Stands in for the package flash-attn: its functions in plain PyTorch, and the borders that they were given."""

    def __init__(self):
        self.borders = []

    def whole(self, q, k, v, *, softmax_scale=None, window_size=(-1, -1), softcap=None, **_):
        """One sequence: q, k, v (1, T, heads, width)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)

    def of_lengths(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, **settings):
        """Sequences of several lengths behind one another: q, k, v (T, heads, width)."""
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.borders.append(cu_seqlens_q.tolist())
        parts = [slice(*ends) for ends in pairwise(cu_seqlens_q.tolist())]
        return torch.cat([self.whole(q[None, at], k[None, at], v[None, at], **settings)[0] for at in parts])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "opt"])
def test_flash_attention_is_given_the_examples_of_a_joined_row_by_their_borders(family, monkeypatch):
    kernels = Kernels()
    supported = dict.fromkeys(["window_size", "softcap"], True)
    settings = partial(
        modeling_flash_attention_utils._process_flash_attention_kwargs, supports_mapping=defaultdict(bool, supported)
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda implementation: (
        (kernels.whole, kernels.of_lengths, None, None, None), (settings, None)
    ))  # fmt: skip
    model = model_of(config_of(family))
    model.config._attn_implementation = "flash_attention_2"
    loss, gradient = differences(model, ((9, 14, 2, 21),))
    assert set(map(tuple, kernels.borders)) == {(0, 9, 23, 25, 46)}
    assert loss < 1e-6
    assert gradient < 5e-6


@pytest.mark.parametrize("family", ["gptj", "gpt_neo"])
def test_models_with_a_flash_attention_of_their_own_are_refused_with_it_alone(family):
    model = model_of(config_of(family))
    check_packing(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="does not give positions to flash_attention_2"):
        check_packing(model)


def test_rows_are_joined_for_flash_attention_alone():
    joined = {kernel: joins_rows(LoadingConfig(attn_implementation=kernel)) for kernel in ("auto", "sdpa", "eager")}
    assert not any(joined.values())
    assert joins_rows(LoadingConfig(attn_implementation="flash_attention_2"))
    assert Packing.of(4, 100, joined=True) == Packing(rows=1, length=400)
    assert Packing.of(4, 100, joined=False) == Packing(rows=4, length=100)
