"""NEFTune: the noise in training is the one of its paper, evaluations have none, and so has what is trained on."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sorsa_ds.config.schema import RunConfig, TrainConfig
from sorsa_ds.train.embedding_noise import add_embedding_noise
from tests.helpers.architectures import CONFIGS
from tests.helpers.projects import metrics
from tests.helpers.runs import train

IDS = torch.arange(60).view(5, 12) % 64


def test_the_noise_is_uniform_up_to_alpha_over_the_root_of_positions_times_width():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    embeddings = model.get_input_embeddings()
    clean = embeddings(IDS)
    add_embedding_noise(model, 5.0)
    most = 5.0 / math.sqrt(12 * clean.shape[2])
    torch.manual_seed(7)
    drawn = torch.empty_like(clean).uniform_(-most, most)
    torch.manual_seed(7)
    torch.testing.assert_close(model.train().get_input_embeddings()(IDS) - clean, drawn, rtol=0, atol=1e-6)
    assert torch.equal(model.eval().get_input_embeddings()(IDS), clean)


class _Mute(torch.nn.Module):
    """A model that does not tell its embeddings."""


def test_a_model_without_embeddings_is_refused_by_name():
    with pytest.raises(ValueError, match="train.neftune_noise_alpha=5: _Mute does not tell its input embeddings"):
        add_embedding_noise(_Mute(), 5.0)


def test_a_row_on_several_ranks_gets_no_noise():
    with pytest.raises(ValueError, match="train.neftune_noise_alpha=5 .*train.sequence_parallel=2"):
        RunConfig(train=TrainConfig(sequence_parallel=2, neftune_noise_alpha=5.0))


@pytest.mark.slow
def test_noise_and_smoothing_are_in_the_steps_and_not_in_the_evaluations(project):
    """A rate of almost nothing leaves the model as it is, so that all evaluations are those of the model."""
    still = ["train.learning_rate=1e-12", "train.eval_every=2"]
    runs = {
        name: train(project, name, *still, *words, ds="zero3", ranks=2)[0]
        for name, words in {
            "plain": [], "noise": ["train.neftune_noise_alpha=30"], "smoothed": ["train.label_smoothing=0.3"],
        }.items()
    }  # fmt: skip
    for name in ("noise", "smoothed"):
        evaluated, wanted = (metrics(runs[one], "eval_loss") for one in (name, "plain"))
        assert len(wanted) == 4
        assert evaluated == pytest.approx(wanted, rel=1e-6)
        reports = [json.loads((runs[one] / "report.json").read_text()) for one in (name, "plain")]
        assert reports[0]["start_loss"] == pytest.approx(reports[1]["start_loss"], rel=1e-6)
        for loss, plain in zip(metrics(runs[name], "loss"), metrics(runs["plain"], "loss"), strict=True):
            assert abs(loss - plain) > 1e-4 * plain, name
