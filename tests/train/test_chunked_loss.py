"""The loss in chunks: the same loss and gradients as from all logits, and never more logits than a chunk has."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from benchmarks.helpers.family_run import examine
from benchmarks.helpers.logit_bytes import logit_bytes
from sorsa_ds.config.schema import AdapterConfig, DataConfig, RunConfig, TrainConfig
from sorsa_ds.data.batches import BatchPlan
from sorsa_ds.data.token_store import Examples
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.plan import logits
from sorsa_ds.plan.logits import LOGIT_BYTES
from sorsa_ds.runtime import collectives
from sorsa_ds.train import chunked_loss
from sorsa_ds.train.chunked_loss import why_not_chunked
from sorsa_ds.train.loss import LossOptions, mean_loss, summed_loss, training_losses
from sorsa_ds.train.loss_options import choose_options
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.padding import Padding
from tests.helpers.architectures import save
from tests.helpers.engines import CASES, MICRO, build, ds_config, sequences
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
    loss = training_losses(model, batch_of(), options)[0]
    return loss.detach(), torch.autograd.grad(loss * 0.37, trained, allow_unused=True)


def assert_same(model, chunk, smoothing=0.0):
    """The loss and gradients in chunks are those of all logits, to 1e-6 of each gradient's norm."""
    (whole, wanted), (parts, found) = (gradients(model, LossOptions(chunk=n, smoothing=smoothing)) for n in (0, chunk))
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
def test_so_are_smoothed_ones(name):
    assert_same(made(HEADS[name]), 4, smoothing=0.15)


@pytest.mark.parametrize("name", HEADS)
def test_a_frozen_head_gets_no_gradient_and_the_others_theirs(name):
    model = made(HEADS[name])
    model.get_output_embeddings().requires_grad_(False)
    assert_same(model, 5)


def losses_and_gradients(folder, stage, adapter, options, precision):
    """The losses of three passes, evaluated ones, and the gradients by all that is trained, of an engine in this world.

    The ranks have other numbers of learned tokens, and so other numbers of chunks.
    """
    from deepspeed.utils import safe_get_full_grad

    passes, world = 3, collectives.world_size()
    ds = ds_config(stage, "", 0.0, passes)
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine = build(folder, ds, CASES[0], precision, adapter=adapter)
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


def with_and_without(folder, stage, adapter, precision):
    """Both of an engine that has all logits at once, and of one that has those of three positions."""
    return [losses_and_gradients(folder, stage, adapter, LossOptions(chunk=n), precision) for n in (0, 3)]


def distance(found, wanted):
    """How far all gradients together are from others, relatively."""
    assert found.keys() == wanted.keys()
    found, wanted = (torch.cat([one[name].flatten().double() for name in wanted]) for one in (found, wanted))
    return (found - wanted).norm() / wanted.norm()


FROZEN, ADAPTED, WHOLE = (
    AdapterConfig(rank=5),
    AdapterConfig(rank=5, targets=["all-linear", "lm_head"]),
    AdapterConfig(rank=5, train_whole=["embeddings-and-head"]),
)


@pytest.mark.parametrize(
    ("name", "stage", "adapter"),
    [
        ("llama", 0, ADAPTED),
        ("llama", 2, WHOLE),
        ("llama", 3, FROZEN),
        ("llama", 3, ADAPTED),
        ("llama", 3, WHOLE),
        ("llama-tied-bias", 3, WHOLE),
    ],
)
def test_two_ranks_learn_alike_in_chunks(tmp_path, name, stage, adapter):
    save(name, tmp_path)
    for (losses, wanted), (parts, found) in run_ranks(2, with_and_without, tmp_path, stage, adapter, "fp32"):
        assert parts == pytest.approx(losses, rel=1e-6)
        assert distance(found, wanted) <= 1e-6


def test_in_mixed_precision_they_learn_alike_but_for_rounding(tmp_path):
    save("llama", tmp_path)
    for (losses, wanted), (parts, found) in run_ranks(1, with_and_without, tmp_path, 3, WHOLE, "mixed"):
        assert parts == pytest.approx(losses, rel=1e-3)
        assert distance(found, wanted) <= 2e-2


def losses_of_uneven_ranks(folder, stage):
    """Losses and norms of three steps in which ranks differ in what they learn: nothing, little, more than a chunk."""
    found = []
    for chunk in (0, 8):
        engine = build(folder, ds_config(stage, "", 0.0, 1), CASES[0])
        for step in range(3):
            length = (2, 4, 20)[(step + collectives.rank()) % 3]
            ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(step))
            labels = ids if length > 2 else torch.full_like(ids, -100)
            collated = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            losses = []

            def micro_batch(engine=engine, collated=collated, chunk=chunk, losses=losses):
                losses.append(summed_loss(engine, collated, LossOptions(chunk=chunk)) * 0.1)
                yield losses[0]

            norm = engine.train_step(micro_batch()).grad_norm
            found.append((losses[0].item(), norm))
        engine.destroy()
    return found[:3], found[3:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_take_the_same_way_whatever_they_learn(tmp_path, stage):
    """Under ZeRO-3 one that computes its head otherwise than the others would wait for them for ever."""
    save("llama", tmp_path)
    for wanted, found in run_ranks(3, losses_of_uneven_ranks, tmp_path, stage):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def norms_in_bf16(folder):
    """The norms of the gradient of two steps of three passes each on ZeRO-1, with all logits and in chunks."""
    norms = []
    for chunk in (0, 3):
        engine = build(folder, ds_config(1, "", 0.0, 3, bf16=True), CASES[0], "bf16")
        for step in range(2):
            batches = sequences(3 * MICRO, seed=step)

            def losses(engine=engine, batches=batches, chunk=chunk):
                for at in range(3):
                    ids, labels = (torch.cat(parts) for parts in zip(*batches[at * MICRO :][:MICRO], strict=True))
                    collated = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
                    yield summed_loss(engine, collated, LossOptions(chunk=chunk)) * 0.1

            norms.append(engine.train_step(losses()).grad_norm)
        engine.destroy()
    return norms[:2], norms[2:]


@pytest.mark.parametrize("name", ["plain", "soft cap"])
def test_in_bf16_every_pass_adds_its_own_gradient_once(tmp_path, name):
    """DeepSpeed clears the gradients of a pass when the next backward pass reaches what its engine has returned."""
    made(HEADS[name]).save_pretrained(tmp_path)
    ((wanted, found),) = run_ranks(1, norms_in_bf16, tmp_path)
    assert found == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_loss_is_not_rounded_to_the_dtype_of_its_gradients(dtype):
    model = made(HEADS["plain"], dtype)
    scale, norms = 0.0333, []
    for factor in (1.0, scale):
        model.zero_grad()
        (summed_loss(model, batch_of(), LossOptions(chunk=4)) * factor).backward()
        norms.append(nn.utils.get_total_norm([one.grad.double() for one in model.parameters()]).item())
    assert norms[1] / norms[0] == pytest.approx(scale, rel=1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(
    ("name", "bytes_per_logit"), [("plain", 8), ("tied", 8), ("scaled", 12), ("divided", 12), ("soft cap", 20)]
)
@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_no_more_logits_exist_than_a_chunk_has(name, bytes_per_logit, chunk):
    model = made(HEADS[name])
    model.get_input_embeddings().requires_grad_(False)
    found = logit_bytes(model, batch_of(), LossOptions(chunk=chunk), VOCABULARY)
    assert found == bytes_per_logit * chunk * VOCABULARY
    assert logit_bytes(model, batch_of(), LossOptions(), VOCABULARY) > 3 * 13 * 4 * VOCABULARY


def test_in_bf16_a_chunk_takes_no_more_than_is_planned():
    model = made(HEADS["plain"], torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    found = logit_bytes(model, batch_of(), LossOptions(chunk=4), VOCABULARY)
    assert 4 * 4 * VOCABULARY < found <= LOGIT_BYTES * 4 * VOCABULARY


def test_a_batch_that_learns_nothing_has_loss_zero_and_a_graph():
    model = made(HEADS["plain"])
    ids = torch.randint(3, VOCABULARY, (3, 5))
    nothing = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    loss = summed_loss(model, nothing, LossOptions(chunk=2))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or parameter.grad.eq(0).all() for parameter in model.parameters())


def test_a_model_is_as_it_was_after_a_pass_and_after_a_failure():
    model = made(HEADS["soft cap"])
    children, head = dict(model._modules), model.get_output_embeddings()
    summed_loss(model, batch_of(), LossOptions(chunk=2))
    bad = batch_of()
    bad.labels.fill_(VOCABULARY)  # no token of the model
    with pytest.raises((RuntimeError, IndexError)):
        summed_loss(model, bad, LossOptions(chunk=2))
    assert dict(model._modules) == children and "forward" not in vars(head) and not head._forward_hooks


def test_the_products_are_as_many_as_without_chunks():
    model = made(HEADS["plain"])
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    counted = []
    for chunk in (0, 2):
        with FlopCounterMode(display=False) as counter:
            summed_loss(model, batch_of(), LossOptions(chunk=chunk)).backward()
        counted.append(counter.get_total_flops())
    product = 2 * 40 * VOCABULARY  # of one position, in the forward and again in the backward pass
    assert counted[0] - counted[1] == 2 * product * (3 * 13 - 13)  # all logits: positions that any sequence learns


def config_of(loss_chunk):
    """A run's settings with examples of 64 tokens."""
    return RunConfig(
        model="m", train=TrainConfig(loss_chunk=loss_chunk, precision="fp32"), data=DataConfig(max_length=64)
    )


def plan_of(positions=None):
    """Batches of 2 examples, or of so many positions, in a run of one step."""
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    examples = Examples.of([{"input_ids": one, "labels": one} for one in ids])
    return BatchPlan(
        examples, micro_batch_size=2, accumulation=1, rank=0, world_size=1, seed=0, pad_token_id=0, steps=1,
        micro_batch_tokens=positions,
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 1])  # 1: the run is over, and is measured once more
def test_a_run_says_how_it_computes_the_loss(capsys, step):
    options = choose_options(made(HEADS["plain"]), config_of(50), plan_of(), step, CPU, SequenceParallel())
    assert options == LossOptions(Padding.POSITIONS, 50)
    said = capsys.readouterr()
    assert "Right padding: no attention mask, positions counted from 0" in said.out + said.err
    assert "the logits of 50 positions at a time, of at most 128 (train.loss_chunk)" in said.out + said.err


def test_the_positions_of_levelled_micro_batches_decide_whether_there_are_chunks():
    """They may be more than `micro_batch_size` examples have."""
    found = choose_options(made(HEADS["plain"]), config_of(200), plan_of(512), 0, CPU, SequenceParallel())
    assert found.chunk == 200


def test_a_model_whose_head_cannot_be_called_alone_is_refused_or_has_all_logits(capsys, monkeypatch):
    model = AutoModelForCausalLM.from_config(BertConfig(**SMALL, is_decoder=True)).train()
    assert "part of another of its modules" in why_not_chunked(model)
    with pytest.raises(ValueError, match=r"train.loss_chunk=50: the output head of BertLMHeadModel .* set train.loss_"):
        choose_options(model, config_of(50), plan_of(), 0, CPU, SequenceParallel())
    monkeypatch.setattr(logits, "BUDGET", 1)
    monkeypatch.setattr(logits, "SMALLEST_CHUNK", 1)
    assert choose_options(model, config_of("auto"), plan_of(), 0, CPU, SequenceParallel()).chunk == 0
    said = capsys.readouterr()
    assert "the logits of up to 128 positions at once; the output head of BertLMHeadModel" in said.out + said.err


def test_a_loss_in_chunks_that_is_another_is_found(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_logits", lambda model, head, given: given)  # without the soft cap
    with pytest.raises(ValueError, match="Gemma2ForCausalLM in chunks differs from that of all its logits by"):
        choose_options(made(HEADS["soft cap"]), config_of(50), plan_of(), 0, CPU, SequenceParallel())


def test_a_model_that_trains_a_parameter_of_its_own_has_all_logits():
    model = made(HEADS["plain"])
    model.extra = torch.nn.Parameter(torch.ones(1))
    assert "trains parameters of its own" in why_not_chunked(model)


@pytest.mark.slow
def test_a_run_in_chunks_goes_all_the_way():
    row = examine("gemma2", False, 2, 3, 120.0, "train.loss_chunk=5", "adapter.train_whole=[embeddings-and-head]")
    assert row.result == "pass", row
