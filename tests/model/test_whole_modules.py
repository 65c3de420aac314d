"""Which modules `adapter.train_whole` names, and the rows that new tokens get in the tables of every architecture."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sorsa_ds.config.schema import AdapterConfig, DataConfig, LoadingConfig
from sorsa_ds.model.adapt_partitioned import adapt_partitioned_model
from sorsa_ds.model.new_tokens import add_tokens, grow_tables, new_token_ids, rows_for, with_new_rows
from sorsa_ds.model.selection import choose, summed_up
from sorsa_ds.model.skeleton import skeleton
from tests.helpers.architectures import CONFIGS, save
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.llama_tokenizer import llama_tokenizer


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.up_proj, self.input_norm = nn.Linear(16, 16), nn.Linear(16, 32), nn.LayerNorm(16)


class _Model(nn.Module):
    """Two blocks between embeddings and a head, which may be tied, and a module without parameters."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed_tokens, self.blocks = nn.Embedding(64, 16), nn.ModuleList([_Block(), _Block()])
        self.norm, self.lm_head, self.dropout = nn.LayerNorm(16), nn.Linear(16, 64), nn.Dropout(0.1)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


def whole_names(tied: bool = False, **settings) -> list[str]:
    """Names of what is trained whole."""
    return [one.name for one in choose(_Model(tied), AdapterConfig(rank=4, **settings)).whole]


def test_names_suffixes_and_globs_name_modules():
    assert whole_names(train_whole=[]) == []
    assert whole_names(train_whole=["norm"]) == ["norm.weight", "norm.bias"]  # not input_norm
    assert whole_names(train_whole=["0.input_norm", "embed_*"]) == [
        "embed_tokens.weight", "blocks.0.input_norm.weight", "blocks.0.input_norm.bias"
    ]  # fmt: skip
    assert whole_names(train_whole=["embeddings-and-head"]) == ["embed_tokens.weight", "lm_head.weight", "lm_head.bias"]


def test_a_tied_parameter_is_trained_once():
    for asked in (["embed_tokens"], ["lm_head"], ["embeddings-and-head"]):
        names = whole_names(tied=True, train_whole=asked)
        assert names == ["embed_tokens.weight", *(["lm_head.bias"] if asked != ["embed_tokens"] else [])]
    selection = choose(_Model(tied=True), AdapterConfig(rank=4, train_whole=["embed_tokens"]))
    assert selection.rows()[1] == ("trained whole", "embed_tokens tied with lm_head: 1,024 parameters more")


def test_a_linear_that_is_trained_whole_is_not_adapted():
    selection = choose(_Model(), AdapterConfig(rank=4, train_whole=["1.up_proj", "blocks.0"]))
    assert [target.name for target in selection.targets] == ["blocks.1.q_proj"]
    assert summed_up(selection.left_out) == "q_proj (x1), up_proj (x2): trained whole (adapter.train_whole)"
    assert sum(one.numel for one in selection.whole) == (16 * 16 + 16) + 2 * (16 * 32 + 32) + 2 * 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_whole": ["nrom"]}, "train_whole: 'nrom' matches no module with parameters of this model. Did you "
                                    r"mean 'norm'\? It has: embed_tokens \(x1\)"),
        ({"train_whole": ["dropout"]}, "'dropout' matches no module with parameters"),
        ({"train_whole": ["blocks.1"], "targets": ["q_proj"]},
         "1.q_proj.weight would be trained whole, and it belongs to blocks.1.q_proj, which adapter.targets adapts"),
        ({"train_whole": ["lm_head"], "targets": ["all-linear", "lm_head"]}, "lm_head.* belongs to lm_head, which"),
        ({"train_whole": ["blocks"]}, r"selects no linear.*q_proj \(x2\), up_proj \(x2\): trained whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        choose(_Model(), AdapterConfig(rank=4, **settings))


def test_a_head_that_is_adapted_cannot_be_tied_with_what_is_trained_whole():
    with pytest.raises(ValueError, match="embed_tokens.weight would be trained whole, and it belongs to lm_head"):
        choose(_Model(tied=True), AdapterConfig(rank=4, train_whole=["embed_tokens"], targets=["q_proj", "lm_head"]))


def test_a_model_that_does_not_tell_its_embeddings_is_refused_by_name():
    with pytest.raises(ValueError, match="means nothing in Linear, which does not tell its input embedding"):
        choose(nn.Linear(16, 16), AdapterConfig(rank=4, train_whole=["embeddings-and-head"]))


def test_a_model_in_memory_keeps_its_other_parameters():
    with pytest.raises(ValueError, match="adapter.train_whole: a model in memory keeps its other parameters"):
        adapt_partitioned_model(_Model(), {}, adapter=AdapterConfig(rank=4, train_whole=["norm"]))


@pytest.mark.parametrize("make", [chat_tokenizer, llama_tokenizer])
def test_new_tokens_get_the_next_ids_and_are_found_in_a_text(make, tmp_path):
    tokenizer = make()
    before, text = len(tokenizer), "It is 4.<|new|>Well.<think>"
    plain = tokenizer.decode(tokenizer(text)["input_ids"])
    tokenizer.save_pretrained(tmp_path)
    ids = add_tokens(tokenizer, ["<|new|>", "<think>"])
    assert ids == {"<|new|>": before, "<think>": before + 1}
    assert new_token_ids(tmp_path, LoadingConfig(), list(ids)) == ids and rows_for(ids) == before + 2
    encoded = tokenizer(text)["input_ids"]
    assert [encoded.count(number) for number in ids.values()] == [1, 1]
    assert tokenizer.decode(encoded, skip_special_tokens=True).count("<|new|>") == 1 == plain.count("<|new|>")


def test_tokens_that_are_known_or_no_tokens_are_refused():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match=r"data.new_tokens: the tokenizer knows '<\|im_end\|>' already \(id \d+\)"):
        add_tokens(tokenizer, ["<|im_end|>"])
    with pytest.raises(ValueError, match="data.new_tokens: '<a>' stands there twice"):
        DataConfig(new_tokens=["<a>", "<b>", "<a>"])
    with pytest.raises(ValueError, match="at least 1 item"):
        DataConfig(new_tokens=[""])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_tables_grow_as_transformers_lets_them_grow(name, tmp_path):
    """A padded table, which has room, stays as it is."""
    save(name, tmp_path)
    grown = skeleton(tmp_path, LoadingConfig())
    grow_tables(grown, 60)
    assert {n: p.shape for n, p in grown.named_parameters()} == {
        n: p.shape for n, p in skeleton(tmp_path, LoadingConfig()).named_parameters()
    }
    grow_tables(grown, 67)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tables = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    theirs.resize_token_embeddings(67)
    assert grown.config.get_text_config().vocab_size == 67
    for tie in (False, True):  # with all names, too
        shapes = {n: p.shape for n, p in theirs.named_parameters(remove_duplicate=tie)}
        assert {n: p.shape for n, p in grown.named_parameters(remove_duplicate=tie)} == shapes
    for n, parameter in theirs.named_parameters():
        ours = with_new_rows(tables[n], parameter.shape)
        assert torch.equal(ours[: len(tables[n])], tables[n])
        assert (ours - parameter).abs().max() < 1e-3 * parameter.std(), f"{n}: transformers begins elsewhere"
