"""Which linears `all-linear` means in models as transformers has them, and what it leaves out, with the reason."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.model.selection import choose, summed_up

_SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def bare(kind: str, **fields) -> nn.Module:
    """A small model without memory for its parameters."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**_SMALL, **fields}))


@pytest.mark.parametrize(
    ("kind", "fields", "read"),
    [
        ("mamba", dict(state_size=4, time_step_rank=8), {"x_proj", "dt_proj", "out_proj"}),
        ("falcon_mamba", dict(state_size=4, time_step_rank=8), {"x_proj", "dt_proj", "out_proj"}),
        ("mamba2", dict(num_heads=8, head_dim=8, state_size=8, n_groups=1), {"out_proj"}),
        ("bamba", dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8), {"out_proj"}),
        ("bloom", dict(hidden_size=32, n_head=4, n_layer=2), set()),  # reads weights if slow_but_exact
        ("bloom", dict(hidden_size=32, n_head=4, n_layer=2, pretraining_tp=2, slow_but_exact=True),
         {"dense", "dense_4h_to_h"}),
        ("gptj", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4), set()),  # asks for a weight's dtype
        ("llama", {}, set()),
    ],
)  # fmt: skip
def test_linears_whose_weight_is_read_without_a_call_are_left_out_with_the_place(kind, fields, read):
    chosen = choose(bare(kind, **fields), AdapterConfig(rank=4))
    told = {name: reason for name, reason in chosen.left_out.items() if "reads its weight" in reason}
    assert {name.rpartition(".")[2] for name in told} == read
    assert not {target.name for target in chosen.targets} & told.keys()
    assert all(".forward" in reason or "_block" in reason for reason in told.values()), told


def test_such_a_linear_is_refused_by_name_where_it_is_asked_for():
    model = bare("mamba", state_size=4, time_step_rank=8)
    with pytest.raises(ValueError, match=r"backbone\.layers\.0\.mixer\.out_proj cannot be adapted, since MambaMixer"):
        choose(model, AdapterConfig(rank=4, targets=["in_proj", "out_proj"]))


class _Router(nn.Linear):
    """A linear that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(-1)


class _Model(nn.Module):
    """A linear of each kind that `all-linear` has to tell apart."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 64)
        self.router, self.shared_expert_gate = _Router(16, 16), nn.Linear(16, 1)
        self.embed_tokens = nn.Embedding(64, 16)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({}, ["q_proj"]),
        ({"targets": ["all-linear", "lm_head"]}, ["q_proj", "lm_head"]),
        ({"targets": ["all-linear", "lm_head"], "exclude": ["q_*"]}, ["lm_head"]),
        ({"targets": ["*"], "exclude": ["router", "shared_expert_gate"]}, ["q_proj", "lm_head"]),
        ({"rank_pattern": {"shared_expert_gate": 1}}, ["q_proj", "shared_expert_gate"]),
    ],
)
def test_what_is_meant_is_adapted_and_nothing_else(settings, adapted):
    chosen = choose(_Model(), AdapterConfig(rank=4, **settings))
    assert [target.name for target in chosen.targets] == adapted
    assert chosen.body == 16 * 16 + 16 + 16 * 16 + 16 + 16 + 1
    inside = sum(16 * target.out_features for target in chosen.targets if target.name != "lm_head")
    assert chosen.share == inside / chosen.body


def test_what_is_left_out_is_summed_up_by_reason():
    chosen = choose(_Model(), AdapterConfig(rank=4, targets=["all-linear", "lm_head"], exclude=["q_proj"]))
    assert summed_up(chosen.left_out) == (
        "q_proj (x1): named by adapter.exclude; router (x1): its class _Router computes something else than a linear; "
        "shared_expert_gate (x1): a side shorter than 8 and than the rank"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["router"]}, "router cannot be adapted, since its class _Router computes something else"),
        ({"exclude": ["k_proj"]}, r"adapter.exclude: 'k_proj' matches no linear of this model. Did you mean 'q_proj'"),
        ({"exclude": ["*_proj"]}, r"selects no linear.*q_proj \(x1\): named by adapter.exclude"),
        ({"targets": ["shared_expert_gate"]}, r"rank 4 exceeds min\(out, in\) = 1.*leave them out by adapter.exclude"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        choose(_Model(), AdapterConfig(rank=4, **settings))


class _Shared(nn.Module):
    """Two blocks with one weight, and one of its own."""

    def __init__(self, biases: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 16, bias=biases)}) for _ in range(3))
        self.blocks[2]["up"].weight = self.blocks[0]["up"].weight
        self.position, self.embed_tokens = nn.Embedding(99, 16), nn.Embedding(64, 16)


def test_linears_that_share_a_weight_are_one_target():
    chosen = choose(_Shared(), AdapterConfig(rank=4))
    assert [(target.name, target.shared) for target in chosen.targets] == [
        ("blocks.0.up", ("blocks.2.up",)), ("blocks.1.up", ())
    ]  # fmt: skip
    assert chosen.body == chosen.adapted == 2 * 16 * 16


def test_linears_that_share_a_weight_are_adapted_together_or_not_at_all():
    with pytest.raises(ValueError, match=r"blocks\.0\.up and blocks\.2\.up have one weight in this model"):
        choose(_Shared(), AdapterConfig(rank=4, targets=["blocks.0.up"]))
    with pytest.raises(ValueError, match=r"blocks\.0\.up and blocks\.2\.up have one weight and different biases"):
        choose(_Shared(biases=True), AdapterConfig(rank=4))


def test_a_share_below_a_half_is_a_warning():
    chosen = choose(_Model(), AdapterConfig(rank=4, targets=["q_proj"]))
    assert chosen.warning == (
        "Warning: only 45.6% of the weights between the embeddings and the output head are adapted; the others stay as "
        "they are."
    )
