"""Runs with `train.sequence_parallel`: what N ranks compute together is what one computes alone."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconH1Config, LlamaConfig, MixtralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sorsa_ds.config.batch_size import data_ranks
from sorsa_ds.config.schema import DataConfig, RunConfig, TrainConfig
from sorsa_ds.data.batches import collate
from sorsa_ds.model import sequence_parallel
from sorsa_ds.model.sequence_parallel import SequenceParallel, check_model
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.sequence_shards import shard
from tests.helpers import projects
from tests.helpers.architectures import CONFIGS, LONGROPE
from tests.helpers.projects import metrics
from tests.helpers.runs import assert_learned_the_same, rewound, train, train_rank
from tests.helpers.worlds import run_ranks

TEN = ("train.steps=10", "output.save_every=0")
TOGETHER = "train.sequence_parallel=2"


def same(one, other, steps=10):
    """Compare what two runs have measured and learned, to rounding."""
    assert len(metrics(other, "loss")) == steps
    assert_learned_the_same(one, other, loss=1e-5)
    reports = [json.loads((run / "report.json").read_text()) for run in (one, other)]
    for key in ("base_loss", "start_loss"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-5), key
    tokens = [round(report["tokens_per_second"] * report["train_seconds"]) for report in reports]
    assert tokens[0] == tokens[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["stage0", "zero2", "zero3"])
def test_ten_steps_of_two_ranks_together_are_those_of_one_rank(project, ds):
    alone, _ = train(project, f"alone-{ds}", *TEN, ds=ds, ranks=1)
    together, _ = train(project, f"together-{ds}", *TEN, TOGETHER, ds=ds, ranks=2)
    same(together, alone)


@pytest.mark.slow
def test_two_groups_take_the_micro_batches_of_two_ranks(project):
    alone, _ = train(project, "two", *TEN, "train.global_batch_size=8", ranks=2)
    together, _ = train(project, "two-groups", *TEN, "train.global_batch_size=8", TOGETHER, ranks=4)
    same(together, alone)
    resolved = json.loads((together / "ds_config.json").read_text())
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (2, 2)


@pytest.mark.slow
def test_more_ranks_than_heads_of_keys_with_recomputed_blocks_and_chunks_of_a_smoothed_loss(project):
    """The model has four heads and two of keys and values; four positions have their logits at once."""
    asked = (*TEN, "train.gradient_checkpointing=true", "train.loss_chunk=4", "train.label_smoothing=0.2")
    alone, _ = train(project, "one-alone", *asked, ds="zero2", ranks=1)
    together, _ = train(project, "four-together", *asked, "train.sequence_parallel=4", ds="zero2", ranks=4)
    same(together, alone)


@pytest.mark.slow
def test_a_levelled_stream_is_cut_too(project):
    asked = (
        "data.streaming=true", "data.shuffle_buffer=8", "data.eval_size=0", "data.max_length=100",
        "train.micro_batch_tokens=auto",
    )  # fmt: skip
    alone, _ = train(project, "stream-alone", *asked, ranks=1)
    together, _ = train(project, "stream-together", *asked, TOGETHER)
    same(together, alone, steps=6)


@pytest.mark.slow
def test_a_run_goes_on_with_as_many_ranks_together_as_it_is_asked_for(project):
    run, _ = train(project, "from-two", TOGETHER)
    apart, alone = (rewound(project, run, name, 2) for name in ("to-apart", "to-alone"))
    train(project, apart.name, "--resume=auto")
    train(project, alone.name, "--resume=auto", ranks=1)
    again = rewound(project, alone, "to-two", 4)
    train(project, again.name, TOGETHER, "--resume=auto")
    for other in (apart, alone, again):
        same(other, run, steps=6)


@pytest.fixture(scope="module")
def long_project(tmp_path_factory):
    """A project with one block of two heads of 8 numbers, and two examples of 32,767 tokens, which is odd."""
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    folder = projects.make(tmp_path_factory.mktemp("long"), LlamaConfig(**small, num_key_value_heads=1))
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**15}))
    random = np.random.default_rng(0)
    rows = []
    for length in (2**15 - 1, 2**15 - 1):
        ids = random.integers(3, config["vocab_size"], length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 100 + ids[100:]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_sequences_of_32k_tokens(long_project):
    asked = (
        "train.steps=1", "train.global_batch_size=1", "train.micro_batch_size=1", "data.max_length=32768",
        "data.eval_size=0", "data.format=tokens", "output.save_every=0",
    )  # fmt: skip
    alone, _ = train(long_project, "long-alone", *asked, ranks=1)
    together, _ = train(long_project, "long-together", *asked, TOGETHER)
    same(together, alone, steps=1)


def parts(size: int) -> list[SequenceParallel]:
    """What each of `size` ranks knows of its place, without a process group."""
    found = []
    for rank in range(size):
        part = SequenceParallel()
        part.size, part.rank = size, rank
        found.append(part)
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_hold_every_token_once_and_the_label_behind_their_last(size):
    lengths, first = (7, 10), 3
    examples = []
    for length in lengths:
        ids = torch.arange(first, first + length)
        examples.append({"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)})
        first += length
    whole = collate(examples, 0)
    shards = [shard(whole, part) for part in parts(size)]
    width = shards[0]["input_ids"].shape[1]
    assert width == -(-10 // size) and len({one["input_ids"].shape for one in shards}) == 1
    for name in ("input_ids", "attention_mask"):
        joined = torch.cat([one[name] for one in shards], 1)
        assert torch.equal(joined[:, :10], whole[name]) and not joined[:, 10:].any()
    # Of each learned token: where the logits are that predict it, among those of all shards, and which it is.
    wanted = {
        (row, at - 1, int(label)) for row, labels in enumerate(whole["labels"])
        for at, label in enumerate(labels) if at and label != -100
    }  # fmt: skip
    found = []
    for rank, one in enumerate(map(MicroBatch.of, shards)):
        rows, columns = np.divmod(one.places_of_all.numpy(), width)
        found += zip(rows.tolist(), (columns + rank * width).tolist(), one.labels.tolist(), strict=True)
        among = one.places.numpy() % max(1, len(one.positions))
        assert one.positions[among].tolist() == columns.tolist()
    assert set(found) == wanted and len(found) == len(wanted)
    assert shard(whole, SequenceParallel()) is whole


def refused(config, size=2, max_length=16, **changes) -> str:
    config = deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"^train\.sequence_parallel={size}: .*; set it to 1$") as stop:
        check_model(model, size, max_length)
    return str(stop.value)


def test_models_that_cannot_be_cut_are_refused_by_name():
    assert "RwkvForCausalLM carries a state" in refused(CONFIGS["rwkv"])
    assert "Phi3ForCausalLM chooses its rotary frequencies by the longest position" in refused(LONGROPE)
    with torch.device("meta"):
        check_model(AutoModelForCausalLM.from_config(LONGROPE), 2, 12)
    assert "PhiForCausalLM has 5 attention heads, which 2 ranks cannot share" in refused(CONFIGS["phi"])
    assert "MistralForCausalLM has layers that see 8 tokens back, fewer than data.max_length=9" in refused(
        CONFIGS["mistral"], max_length=9
    )
    assert "attn_implementation=eager" in refused(CONFIGS["llama"], _attn_implementation="eager")
    assert "has 4 heads of keys and values, and neither of 6 and 4" in refused(
        LlamaConfig(**{**small(), "num_attention_heads": 12, "hidden_size": 48, "num_key_value_heads": 4}), size=6
    )
    assert "BloomForCausalLM takes no positions" in refused(BloomConfig(hidden_size=16, n_head=4, n_layer=1))
    routed = MixtralConfig(**small(), num_local_experts=2, output_router_logits=True)
    assert "adds a loss of its router" in refused(routed)
    assert "FalconH1ForCausalLM" in refused(FalconH1Config(**small()))


def small() -> dict:
    return dict(
        hidden_size=40, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip


def test_models_whose_layers_see_all_that_there_is_are_let_pass():
    for name, size, longest in (("mistral", 4, 8), ("llama", 4, 10**6), ("qwen3", 2, 999), ("gemma", 4, 999)):
        with torch.device("meta"):
            check_model(AutoModelForCausalLM.from_config(CONFIGS[name]), size, longest)


def test_settings_that_do_not_go_together_are_refused_by_name():
    with pytest.raises(ValueError, match="train.sequence_parallel=2 cuts sequences, and data.packing=true"):
        RunConfig(train=TrainConfig(sequence_parallel=2), data=DataConfig(packing=True))
    with pytest.raises(ValueError, match="does not divide the number of ranks, 6: set it to one of 1, 2, 3, 6"):
        data_ranks(6, 4)
    assert data_ranks(6, 2) == 3


@pytest.mark.slow
def test_a_run_stops_before_the_model_is_loaded(project):
    with pytest.raises(AssertionError, match="train.sequence_parallel=2: LlamaForCausalLM computes attention with"):
        train(project, "eager", TOGETHER, "loading.attn_implementation=eager")
    assert not (project / "eager" / "init.json").exists()


def displaced(project, name):
    """One rank of a run whose shards all take the positions of the first."""
    sequence_parallel.SequenceParallel._positions = lambda self, like: (  # in this rank's process alone
        torch.arange(like.shape[1]).expand(like.shape).contiguous()
    )
    train_rank(project, name, "stage0", [TOGETHER], None)


@pytest.mark.slow
def test_a_model_whose_shards_compute_something_else_stops_the_run(project):
    with pytest.raises(AssertionError, match="LlamaForCausalLM gives logits in shards that differ by .*set it to 1"):
        run_ranks(2, displaced, project, "displaced")


def test_an_attention_function_of_somebody_else_is_there_again_afterwards():
    def theirs():
        """An attention kernel that was registered before."""

    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    part, _ = parts(2)
    for before in (own, theirs):
        if before is theirs:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
        part.attach(model)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] not in (own, theirs)
        part.detach()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
