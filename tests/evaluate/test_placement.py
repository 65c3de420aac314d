"""Models that are larger than one device: spread by accelerate, with the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sorsa_ds.evaluate.backends import placement
from sorsa_ds.evaluate.backends.placement import place, weight_bytes
from sorsa_ds.runtime.memory import GIB
from sorsa_ds.sorsa.packed_storage import Nf4

CPU = torch.device("cpu")


def test_the_bytes_are_those_of_the_loaded_weights(tiny_llama):
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
        assert weight_bytes(tiny_llama, dtype) == sum(p.nbytes for p in model.parameters())
    assert weight_bytes(tiny_llama, None) == weight_bytes(tiny_llama, torch.float32)


def test_the_bytes_of_packed_weights_are_those_of_their_tensors(tiny_llama):
    model, storage = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), Nf4(64)
    packed = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    saved = sum(p.nbytes - sum(part.nbytes for part in storage.pack(p.detach())) for p in packed.values())
    whole = weight_bytes(tiny_llama, torch.float32)
    assert weight_bytes(tiny_llama, torch.float32, dict.fromkeys(packed, storage)) == whole - saved < whole / 2


def test_what_fits_lies_on_one_device(tiny_llama):
    assert place(tiny_llama, None, CPU) == placement.Placement({"device_map": {"": CPU}})


def test_what_does_not_fit_is_spread_over_memory_and_disk_and_computes_the_same(tiny_llama, monkeypatch):
    """accelerate spreads over GPUs in the same way; a CPU and a disk are two places that every machine has."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    monkeypatch.setattr(placement, "free_memory", lambda: int(weight_bytes(tiny_llama, None) * 0.9))
    found = place(tiny_llama, torch.float32, CPU)
    assert (
        found.told.startswith("Spread over memory and disk: the model's weights take 0.0 GiB") and "slow" in found.told
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, **found.arguments)
    assert {"cpu", "disk"} <= {str(device) for device in model.hf_device_map.values()}
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_gpus_are_counted_by_what_is_free_on_each(tiny_llama, monkeypatch):
    monkeypatch.setattr(placement, "weight_bytes", lambda folder, dtype: 140 * GIB)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: ((70 if device.index else 40) * GIB, 80 * GIB))
    found = place(tiny_llama, torch.bfloat16, torch.device("cuda", 0))
    assert found.told == ("Spread over 4 GPUs: the model's weights take 140.0 GiB, and 40.0 GiB are free on cuda:0.")
    limits = found.arguments["max_memory"]
    assert [round(limits[index] * placement.ROOM / GIB) for index in range(4)] == [40, 70, 70, 70]


def test_ranks_that_share_the_gpus_are_refused_with_the_ways_out(tiny_llama, monkeypatch):
    monkeypatch.setattr(placement, "weight_bytes", lambda folder, dtype: 140 * GIB)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (79 * GIB, 80 * GIB))
    monkeypatch.setattr("sorsa_ds.runtime.collectives.world_size", lambda: 8)
    with pytest.raises(
        ValueError, match=r"take 140\.0 GiB, and 79\.0 GiB are free on cuda:3.*python launch/evaluate\.py.*vllm"
    ):
        place(tiny_llama, torch.bfloat16, torch.device("cuda", 3))
