"""Weights that lack rank: their trailing singular values are rounding, from which no learning rate follows."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.projects import metrics
from tests.helpers.runs import train

pytestmark = pytest.mark.slow
ONE = {"ranks": 1, "ds": "stage0"}
TRAILING = "sorsa.triplets=trailing"


@pytest.fixture(scope="module")
def lacking(project):
    """The project, with a model whose linears have six singular values of 0; rank 4 is trained."""
    model = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            U, s, Vt = torch.linalg.svd(module.weight.data.double(), full_matrices=False)
            s[-6:] = 0
            module.weight.data.copy_(U * s @ Vt)
    model.save_pretrained(project / "model")
    return project


def test_auto_says_that_no_rate_follows(lacking):
    with pytest.raises(AssertionError, match="all that are trained are 0 or rounding: set a number"):
        train(lacking, "auto", TRAILING, "train.learning_rate=auto", **ONE)


@pytest.mark.parametrize(
    "setting", ["sorsa.column_rates=inverse", "sorsa.column_rates=inverse_sqrt", "sorsa.s_space=log"]
)
def test_rates_of_columns_are_refused_by_the_layers_name(lacking, setting):
    with pytest.raises(
        AssertionError, match=rf"{setting}: model.layers.0.*q_proj lacks rank, and the 4 singular values"
    ):
        train(lacking, setting, TRAILING, setting, **ONE)


def test_other_triplets_and_equal_rates_train(lacking):
    for name, settings in (("equal", (TRAILING,)), ("leading", ("sorsa.column_rates=inverse", "sorsa.s_space=log"))):
        run, _ = train(lacking, name, *settings, **ONE)
        before, after = metrics(run, "eval_loss")
        assert before != after < before + 1
