"""How many positions have their logits at once: the setting, the plan's bytes, and the plan's words."""

import pytest

from sorsa_ds.config.schema import AdapterConfig, DataConfig, RunConfig, TrainConfig
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.logits import BUDGET, LOGIT_BYTES, SMALLEST_CHUNK, loss_chunk
from sorsa_ds.plan.report import as_json, as_text, plan
from tests.helpers.architectures import save


@pytest.mark.parametrize(
    ("asked", "positions", "vocabulary", "chunk"),
    [
        (0, 10**6, 128_256, 0),
        (100, 100, 128_256, 0),
        (100, 101, 128_256, 100),
        ("auto", 512, 128_256, 0),
        ("auto", 4096, 128_256, 512),  # 512 x 128,256 x 12 = 0.73 GiB; 768 would be 1.1
        ("auto", 4096, 32_000, 2560),
        ("auto", 4096, 2_000_000, SMALLEST_CHUNK),
        ("auto", 300, 2_000_000, SMALLEST_CHUNK),
    ],
)
def test_auto_stays_within_a_gibibyte_and_does_nothing_where_all_fit(asked, positions, vocabulary, chunk):
    assert loss_chunk(asked, positions, vocabulary) == chunk


def planned(folder, loss_chunk, **adapter):
    """The plan of 2 sequences of 64 tokens on a tiny model with 64 tokens and a width of 40."""
    config = RunConfig(
        model=str(folder),
        train=TrainConfig(loss_chunk=loss_chunk, precision="fp32", micro_batch_size=2),
        data=DataConfig(max_length=64),
        adapter=AdapterConfig(rank=5, **adapter),
    )
    return plan(folder, Job.of(config, {}, Hardware()))


@pytest.mark.parametrize(("trained", "head"), [([], 0), (["lm_head"], 2 * 4 * 64 * 40)])
def test_a_plan_counts_and_tells_the_logits_of_a_chunk(tmp_path, trained, head):
    folder = save("llama", tmp_path)
    whole, parts = (planned(folder, chunk, train_whole=trained) for chunk in (0, 50))
    assert whole.memory.gpu["logits"] == 128 * 64 * LOGIT_BYTES
    assert parts.memory.gpu["logits"] == 50 * 64 * LOGIT_BYTES
    # the head's inputs at learned positions, their gradients, and those of its weight twice
    more = parts.memory.gpu["activations"] - whole.memory.gpu["activations"]
    assert more == 2 * 128 * 40 * 4 + head
    assert as_json(parts)["loss_chunk"] == 50 and as_json(whole)["loss_chunk"] == 0
    assert "the logits of 50 positions at once, of 128 (train.loss_chunk)" in as_text(parts)
    assert "train.loss_chunk" not in as_text(whole)


def test_auto_takes_no_more_than_its_budget():
    for vocabulary in (32_000, 128_256, 256_000):
        assert loss_chunk("auto", 10**6, vocabulary) * vocabulary * LOGIT_BYTES <= BUDGET
