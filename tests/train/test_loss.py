"""The loss against its definition, on every architecture, and the work that the output head is spared."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.train.loss import LossOptions, summed_loss, takes_positions, training_losses
from tests.helpers.architectures import CONFIGS
from tests.helpers.expert_models import EXPERT_CONFIGS


def batch_of(learned: list[slice]) -> dict[str, torch.Tensor]:
    """A sequence of 12 tokens for each slice of learned ones; the last two are padding."""
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (len(learned), 12))
    labels = torch.full_like(ids, IGNORED)
    for row, part in enumerate(learned):
        labels[row, part] = ids[row, part]
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_definition(model, batch):
    """Token after token, from all logits."""
    log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    total = 0.0
    for row, label in enumerate(batch["labels"]):
        for position in range(1, len(label)):
            if label[position] != IGNORED:
                total = total - log_p[row, position - 1, label[position]]
    return total


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_loss_and_gradient_are_the_definition(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0  # GPT-2's; RWKV's eval mode cannot be differentiated
    batch = batch_of([slice(4, 7), slice(6, 10), slice(0, 2)])
    ours, theirs = summed_loss(model, batch), by_definition(model, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    weight = model.get_input_embeddings().weight
    mine, wanted = (torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_a_smoothed_loss_and_its_gradient_are_those_of_transformers_label_smoother(smoothing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.get_output_embeddings().weight.data.mul_(30)  # logits that are far from alike
    batch = batch_of([slice(4, 7), slice(6, 10), slice(0, 2)])
    likely = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
    batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] == IGNORED, IGNORED, likely)
    options = LossOptions(smoothing=smoothing)
    ours, _ = training_losses(model, batch, options)
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    theirs = LabelSmoother(epsilon=smoothing)(outputs, batch["labels"], shift_labels=True) * learned
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (ours.item() == pytest.approx(by_definition(model, batch).item(), rel=1e-3)) == (smoothing == 0.0)
    assert summed_loss(model, batch, options).item() == pytest.approx(by_definition(model, batch).item(), rel=1e-5)
    weight = model.get_input_embeddings().weight
    mine, wanted = (torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [12, 1])  # 1: dummies alone
def test_a_batch_that_learns_nothing_has_loss_zero_and_a_graph(length):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    batch = batch_of([slice(0, 0), slice(0, 1)])  # nothing is before a first token
    loss = summed_loss(model, {key: value[:, :length] for key, value in batch.items()})
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def test_the_head_multiplies_only_where_something_is_learned():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    few, all_of_them = batch_of([slice(4, 7), slice(5, 9)]), batch_of([slice(0, 12), slice(0, 12)])
    counted = []
    for batch in (few, all_of_them):
        with FlopCounterMode(display=False) as counter:
            summed_loss(model, batch)
        counted.append(counter.get_total_flops())
    hidden, vocabulary = model.lm_head.weight.shape[::-1]
    assert counted[1] - counted[0] == 2 * 2 * (11 - 5) * hidden * vocabulary  # positions 3 to 7 of 0 to 10


def test_only_transformers_own_models_are_asked_for_positions():
    assert takes_positions(type(AutoModelForCausalLM.from_config(CONFIGS["gpt2"])))

    class Remote(torch.nn.Module):
        def forward(self, input_ids, logits_to_keep=0):
            """A model from the hub, in which it is a number."""

    assert not takes_positions(Remote)


def test_the_routers_loss_is_what_the_model_adds_itself():
    torch.manual_seed(0)
    config = copy.deepcopy(EXPERT_CONFIGS["mixtral"])
    config.output_router_logits, config.router_aux_loss_coef = True, 0.7
    model = AutoModelForCausalLM.from_config(config).train()
    batch = batch_of([slice(0, 12)])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    loss, balance = training_losses(model, batch)
    assert balance is not None and balance.item() > 0.5
    own = model(**batch).loss
    torch.testing.assert_close(loss / 11 + balance, own)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss / 11 + balance, trained)
    theirs = torch.autograd.grad(own, trained)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)


def test_no_loss_of_a_router_without_the_models_asking_for_it():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPERT_CONFIGS["mixtral"])
    assert training_losses(model, batch_of([slice(0, 10)]))[1] is None


def test_a_routers_loss_without_a_coefficient_is_refused():
    torch.manual_seed(0)
    config = copy.deepcopy(EXPERT_CONFIGS["mixtral"])
    config.output_router_logits = True
    model = AutoModelForCausalLM.from_config(config)
    del model.router_aux_loss_coef
    with pytest.raises(ValueError, match=r"MixtralForCausalLM .* no router_aux_loss_coef .* output_router_logits"):
        training_losses(model, batch_of([slice(0, 10)]))
