"""What steps are measured with: flops and bytes against sizes that are known, and the HF Trainer's steps."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.helpers.flops import flop_counter
from benchmarks.helpers.hf_trainer import TrainerSteps
from benchmarks.helpers.memory import Made, held_bytes
from tests.helpers.architectures import save
from tests.helpers.worlds import run_ranks


def test_attention_and_products_in_place_are_counted():
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    square = 2 * (2 * 3 * 8 * 8 * 4)
    with flop_counter() as forward:
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(8, 8))
    with flop_counter() as backward:
        y.sum().backward()
        torch.zeros(5, 6).addmm_(torch.ones(5, 7), torch.ones(7, 6))
    assert forward.get_total_flops() == 2 * square
    assert backward.get_total_flops() == 5 * square + 2 * 5 * 6 * 7  # the scores once more, and four gradients


def test_held_and_made_bytes_are_those_of_a_step_of_sgd_with_momentum():
    torch.manual_seed(0)
    before = held_bytes()
    w = torch.randn(100, 50, requires_grad=True)
    x = torch.randn(30, 100)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)

    def step():
        (x @ w).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held, made = held_bytes() - before, Made()
    with made.counting():
        step()
    assert 0 <= held - 4 * (2 * w.numel() + x.numel()) < 100  # the momentum; a scalar or two
    assert 0 <= made.nbytes - 4 * w.numel() < 100  # the gradient: the product is gone before it is there


@pytest.fixture
def trained(tmp_path):
    """A model all of whose numbers the Trainer trains, and its first weight as it was."""
    model = AutoModelForCausalLM.from_pretrained(save("llama", tmp_path))
    return model, model.lm_head.weight.detach().clone()


@pytest.mark.slow
def test_a_call_is_one_step_of_the_trainer_alone(trained, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    model, before = trained
    step = TrainerSteps(model, torch.arange(24).view(2, 12), bf16=False)
    entered = []

    @contextlib.contextmanager
    def inside():
        entered.append(model.lm_head.weight.detach().clone())
        yield
        entered.append(model.lm_head.weight.detach().clone())

    step(within=inside())
    assert torch.equal(entered[0], before)
    assert not torch.equal(entered[1], before)
    step()
    assert not torch.equal(model.lm_head.weight, entered[1])
    assert not isinstance(step._trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert step._trainer.state.global_step == 2


@pytest.mark.slow
def test_what_fails_in_the_trainers_thread_fails_in_the_call(trained):
    step = TrainerSteps(trained[0], torch.full((2, 12), 10**6), bf16=False)
    with pytest.raises(IndexError):
        step()


def _bucket_dtypes(folder):
    """Dtypes in which gradients are averaged, by method and stage, in mixed precision."""
    from benchmarks.helpers.models import engine_of, shaped_model

    return {
        (method, stage): sorted(
            map(str, engine_of(shaped_model(folder, method, 4, stage), stage, "mixed", method == "sorsa")
                .optimizer.ipg_buckets)
        )
        for method in ("sorsa", "lora")
        for stage in (2, 3)
    }  # fmt: skip


@pytest.mark.slow
def test_peers_average_their_gradients_in_the_same_precision(tmp_path):
    found = run_ranks(2, _bucket_dtypes, save("llama", tmp_path))[0]
    assert set(map(tuple, found.values())) == {("torch.float32",)}
