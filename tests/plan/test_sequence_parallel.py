"""Plans with `train.sequence_parallel`: a rank's part of the positions, and what attention exchanges, as a run does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sorsa_ds.config.schema import AdapterConfig, DataConfig, RunConfig, TrainConfig
from sorsa_ds.plan.beside_tensors import PEER, communicators, nccl
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.report import as_text, plan
from tests.helpers.architectures import save
from tests.helpers.runs import train_rank
from tests.helpers.worlds import run_ranks

LENGTH = 32
SIZES = {"micro_batch_size": 2, "global_batch_size": 8}


def job(model: str, ranks: int, together: int, length: int = LENGTH, nodes: int = 1, **train) -> Job:
    config = RunConfig(
        model=model, adapter=AdapterConfig(rank=4), data=DataConfig(max_length=length),
        train=TrainConfig(precision="fp32", sequence_parallel=together, **SIZES | train),
    )  # fmt: skip
    return Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware(gpus=ranks // nodes, nodes=nodes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama with two blocks, four heads of 10 numbers, and two of keys and values."""
    return save("llama", tmp_path_factory.mktemp("planned"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rank_keeps_what_a_part_of_the_positions_takes(folder, checkpointing):
    ways = {"gradient_checkpointing": checkpointing}
    shared = plan(folder, job(str(folder), 2, 2, 64, **ways))
    short = plan(folder, job(str(folder), 1, 1, 32, **ways))
    for name in ("activations", "logits"):
        assert shared.memory.gpu[name] == short.memory.gpu[name], name
    # Eight sequences of 64 tokens in all; each token sees up to 64 others, so half of the work is here.
    whole = plan(folder, job(str(folder), 1, 1, 64, **ways))
    assert shared.speed.flops == whole.speed.flops / 2
    assert shared.speed.tokens == whole.speed.tokens == 8 * 64


def test_copies_of_keys_and_values_are_kept_too(folder):
    """On four ranks each of two heads of keys and of values goes to two ranks, so attention keeps a copy of both."""
    four, two = (plan(folder, job(str(folder), n, n, 16 * n)) for n in (4, 2))
    copies = 2 * 16 * (2 * 2 * 10) * 4
    assert four.memory.gpu["activations"] - two.memory.gpu["activations"] == 2 * copies


def counted(project, name, together):
    """One rank of a run of one step; returns the bytes that attention has received from other ranks in it."""
    from sorsa_ds.train.trainer import Trainer

    received, exchange, step = 0, torch.distributed.all_to_all_single, Trainer.step

    def counting(output, input, *args, **kwargs):
        nonlocal received
        received += output.nbytes * (together - 1) // together
        return exchange(output, input, *args, **kwargs)

    def counted_step(self, number):
        torch.distributed.all_to_all_single = counting
        try:
            return step(self, number)
        finally:
            torch.distributed.all_to_all_single = exchange

    Trainer.step = counted_step  # in this rank's process alone
    asked = (
        "train.steps=1",
        f"data.max_length={LENGTH}",
        "data.format=tokens",
        "data.eval_size=0",
        "train.micro_batch_size=2",
    )
    train_rank(project, name, "stage0", [*asked, f"train.sequence_parallel={together}"], None)
    return received


@pytest.mark.slow
@pytest.mark.parametrize("together", [2, 4])
def test_the_bytes_that_attention_exchanges_are_those_of_a_run(project, together):
    random = np.random.default_rng(0)
    rows = [random.integers(3, 50, LENGTH).tolist() for _ in range(8)]
    (project / "data.jsonl").write_text("".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in rows))
    received = run_ranks(together, counted, project, f"exchange-{together}", together)
    planned = plan(project / "model", job(str(project / "model"), together, together))
    assert received == [planned.traffic.inside["attention"]] * together
    heads = 4 + 4 + 2 * max(2, together)  # of queries, outputs, keys and values
    tokens = 8 * LENGTH // together  # of a rank, in four micro-batches
    assert received[0] == 2 * 2 * tokens * heads * 10 * 4 * (together - 1) // together  # two blocks, forward and back


def test_what_is_exchanged_between_nodes_is_told_apart(folder):
    """Of four ranks on two nodes each receives a quarter from its neighbour, and two from the other node."""
    inside = plan(folder, job(str(folder), 4, 4)).traffic
    split = plan(folder, job(str(folder), 4, 4, nodes=2)).traffic
    a_rank = inside.inside["attention"] / 3
    assert "attention" not in inside.between
    assert split.inside["attention"] == a_rank
    assert split.between["attention"] == 2 * 2 * a_rank
    assert "attention" not in plan(folder, job(str(folder), 4, 1)).traffic.inside


def test_the_ranks_that_share_sequences_have_a_communicator():
    shared, alone = (job("any", 8, together, micro_batch_size=1) for together in (4, 1))
    assert communicators(shared) == [8, 8, 4] and communicators(alone) == [8, 8]
    assert nccl(shared) - nccl(alone) > 3 * PEER


def test_a_plan_tells_the_groups_and_refuses_what_a_run_does(folder):
    text = as_text(plan(folder, job(str(folder), 4, 2)))
    assert "8 = 2 x 2 groups of 2 ranks x 2 accumulated" in text
    with pytest.raises(ValueError, match="LlamaForCausalLM has 4 attention heads, which 8 ranks cannot share equally"):
        plan(folder, job(str(folder), 8, 8))
    with pytest.raises(ValueError, match=r"8 is not 2 ranks x micro-batch 3 .*=2, so many ranks count as one"):
        job(str(folder), 4, 2, micro_batch_size=3)
    with pytest.raises(ValueError, match="train.sequence_parallel=3 does not divide the number of ranks, 4"):
        job(str(folder), 4, 3)


def test_long_sequences_that_do_not_fit_are_shared_by_the_ranks_of_a_node(folder):
    asked = replace(job(str(folder), 4, 1, 2**20, global_batch_size=4, micro_batch_size=1), hardware=Hardware(gpus=4))
    tight = replace(asked, hardware=replace(asked.hardware, gpu_memory=7 * 2**30))
    ways = [way.settings for way in plan(folder, tight).advice]
    assert "train.sequence_parallel=4 train.micro_batch_size=1 train.gradient_accumulation_steps=4" in ways
