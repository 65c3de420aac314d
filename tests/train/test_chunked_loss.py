"""The loss in chunks: the same loss and gradients as from all logits, and never more logits than a chunk has."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from benchmarks.helpers.logit_bytes import logit_bytes
from sorsa_ds.config.schema import RunConfig, SorsaConfig
from sorsa_ds.runtime import collectives
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.train.chunked_loss import LOGIT_BYTES, SMALLEST_CHUNK, loss_chunk, why_not_chunked
from sorsa_ds.train.loss import LossOptions, mean_loss, summed_loss
from sorsa_ds.train.loss_options import choose_options
from sorsa_ds.train.micro_batch import MicroBatch
from tests.helpers.architectures import CONFIGS, save
from tests.helpers.engines import CASES, MICRO, build, ds_config, sequences, whole_factors
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
VOCABULARY = 331  # no other size of these models
SMALL = dict(
    hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
HEADS = {
    "plain": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "soft cap": Gemma2Config(**SMALL, head_dim=10, final_logit_softcapping=3.0),
    "scaled": CohereConfig(**SMALL, logit_scale=0.3),
    "divided": GraniteConfig(**SMALL, logits_scaling=2.5),
}


def made(config, dtype=torch.float32):
    """A random model, every parameter of which is trained."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def batch_of(vocabulary=VOCABULARY):
    """Sequences of 17 tokens with 9, 4 and 0 learned ones."""
    ids = torch.randint(3, vocabulary, (3, 17), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 8:] = ids[0, 8:]
    labels[1, 3:7] = ids[1, 3:7]
    return MicroBatch.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def gradients(model, options):
    """The loss of the batch, scaled as a step does, and its gradients by all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = summed_loss(model, batch_of(), options)
    return loss.detach(), torch.autograd.grad(loss * 0.37, trained, allow_unused=True)


def assert_same(model, chunk):
    """The loss and gradients in chunks are those of all logits, to 1e-6 of each gradient's norm."""
    (whole, wanted), (parts, found) = (gradients(model, LossOptions(chunk=n)) for n in (0, chunk))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_loss_and_gradients_are_those_of_all_logits(name, chunk):
    assert_same(made(HEADS[name]), chunk)


@pytest.mark.parametrize("name", HEADS)
def test_a_frozen_head_gets_no_gradient_and_the_others_theirs(name):
    model = made(HEADS[name])
    model.get_output_embeddings().requires_grad_(False)
    assert_same(model, 5)


def losses_and_gradients(folder, stage, sorsa, options, precision):
    """The losses of three passes, evaluated ones, and the gradients by all that is trained, of an engine in this world.

    The ranks have other numbers of learned tokens, and so other numbers of chunks.
    """
    from deepspeed.utils import safe_get_full_grad

    passes, world = 3, collectives.world_size()
    ds = ds_config(stage, "", 0.0, passes)
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine = build(folder, ds, CASES[0], precision, sorsa=sorsa)
    losses = []
    for step in range(2):  # ZeRO-3 notes the order of modules in the first, and relies on it in the second
        for at in range(passes):
            batch = sequences(MICRO * world, seed=10 * step + at)[MICRO * collectives.rank() :][:MICRO]
            ids, labels = (torch.cat(parts) for parts in zip(*batch, strict=True))
            collated = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            losses.append(mean_loss(engine, [collated], CPU, options))
            loss = summed_loss(engine, collated, options)
            losses.append(loss.item())
            engine.set_gradient_accumulation_boundary(at + 1 == passes)
            engine.backward(loss * 0.1)
            if at + 1 < passes:
                engine.step()
        trained = {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
        grads = {name: safe_get_full_grad(one).clone() for name, one in trained.items()}
        if not step:
            engine.step()
    engine.destroy()
    return losses, grads


def with_and_without(folder, stage, sorsa, precision):
    """Both of an engine that has all logits at once, and of one that has those of three positions."""
    return [losses_and_gradients(folder, stage, sorsa, LossOptions(chunk=n), precision) for n in (0, 3)]


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias"])
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    "sorsa",
    [
        SorsaConfig(rank=5),
        SorsaConfig(rank=5, targets=["all-linear", "lm_head"]),
        SorsaConfig(rank=5, train_whole=["embeddings-and-head"]),
    ],
    ids=["frozen", "adapted", "whole"],
)
def test_two_ranks_learn_alike_in_chunks(tmp_path, name, stage, sorsa):
    if name == "llama-tied-bias" and sorsa.targets != "all-linear":
        sorsa = SorsaConfig(rank=5, targets=["all-linear", "q_proj"])  # a tied head cannot be adapted
    save(name, tmp_path)
    for (losses, wanted), (parts, found) in run_ranks(2, with_and_without, tmp_path, stage, sorsa, "fp32"):
        assert parts == pytest.approx(losses, rel=1e-6)
        assert wanted.keys() == found.keys()
        for one, grad in found.items():
            assert (grad - wanted[one]).norm() <= 1e-6 * wanted[one].norm(), one


def test_in_mixed_precision_they_learn_alike_but_for_rounding(tmp_path):
    save("llama", tmp_path)
    sorsa = SorsaConfig(rank=5, train_whole=["embeddings-and-head"])
    for (losses, wanted), (parts, found) in run_ranks(1, with_and_without, tmp_path, 3, sorsa, "mixed"):
        assert parts == pytest.approx(losses, rel=1e-3)
        for one, grad in found.items():
            assert (grad - wanted[one]).norm() <= 2e-2 * wanted[one].norm(), one


@pytest.mark.parametrize(("name", "bytes_per_logit"), [("plain", 8), ("tied", 8), ("scaled", 8), ("divided", 8)])
@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_no_more_logits_exist_than_a_chunk_has(name, bytes_per_logit, chunk):
    model = made(HEADS[name])
    model.get_input_embeddings().requires_grad_(False)
    found = logit_bytes(model, batch_of(), LossOptions(chunk=chunk), VOCABULARY)
    assert found == bytes_per_logit * chunk * VOCABULARY
    assert found <= LOGIT_BYTES * chunk * VOCABULARY
    assert logit_bytes(model, batch_of(), LossOptions(), VOCABULARY) > 3 * 13 * 4 * VOCABULARY
