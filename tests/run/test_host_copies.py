"""The copies of a checkpoint in host memory: when they are made, what waits for them, and what is written."""

import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from sorsa_ds.run.checkpoint import host_copies
from sorsa_ds.run.checkpoint.host_copies import HostCopies
from sorsa_ds.run.checkpoint.saver import _Writing


def test_what_lies_in_host_memory_is_copied_at_once():
    held = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    held.grad = -torch.ones_like(held)
    optimizer = torch.optim.SGD([held], lr=1.0)
    copies, wait = HostCopies(optimizer).take({"held": held})
    optimizer.step()
    wait()
    assert held.tolist() == [1] * 5
    assert copies["held"].tolist() == [0] * 5
    assert copies["held"].dtype == torch.float32


class _OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


class _Stream:
    """A stream that writes down what it is told to do."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append(f"{self.name} marks the arrival")
        return self

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the arrival on {event.name}")

    def synchronize(self):
        self.log.append(f"a thread waits for {self.name}")


def test_a_gpu_copies_beside_training_whose_next_step_alone_waits(monkeypatch):
    log, empty = [], torch.empty
    training, side = _Stream("training", log), _Stream("side", log)

    @contextmanager
    def on(stream):
        log.append(f"{stream.name} begins")
        yield

    def page_locked(shape, dtype, pin_memory):
        assert pin_memory
        log.append("memory is locked")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(host_copies.torch, "empty", page_locked)
    for name, value in (("Stream", lambda: side), ("current_stream", lambda: training), ("stream", on)):
        monkeypatch.setattr(torch.cuda, name, value)
    held = torch.zeros(5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(held)], lr=1.0)
    optimizer.param_groups[0]["params"][0].grad = -torch.ones(5)
    host = HostCopies(optimizer)
    optimizer.register_step_post_hook(lambda *_: log.append("step"))
    copying = ["side waits for training", "side begins", "side marks the arrival"]
    copies, wait = host.take({"held": held.as_subclass(_OnGpu)})
    assert copies["held"].tolist() == [0] * 5
    optimizer.step()
    optimizer.step()
    wait()
    arrival = "training waits for the arrival on side"
    assert log == ["memory is locked", *copying, arrival, "step", "step", "a thread waits for side"]
    log.clear()
    again, _ = host.take({"held": held.as_subclass(_OnGpu)})
    assert log == copying, "memory is locked once"
    assert again["held"].data_ptr() == copies["held"].data_ptr()
    assert again["held"].tolist() == [2] * 5


def test_the_writer_waits_for_the_copies(tmp_path):
    tensors, arrived = {"held": torch.zeros(5)}, threading.Event()
    writing = _Writing(tmp_path / "rank.safetensors", tensors, lambda: arrived.wait(30), None)
    assert not writing.done()
    tensors["held"].fill_(1)
    arrived.set()
    writing.wait()
    assert load_file(tmp_path / "rank.safetensors")["held"].tolist() == [1] * 5


def test_copies_that_do_not_arrive_fail_the_save(tmp_path):
    def fails():
        raise RuntimeError("CUDA error")

    writing = _Writing(tmp_path / "rank.safetensors", {"held": torch.zeros(5)}, fails, None)
    with pytest.raises(RuntimeError, match="CUDA error"):
        writing.wait()
    assert not list(tmp_path.iterdir())


def test_many_tensors_share_few_blocks_of_page_locked_memory(monkeypatch, tmp_path):
    """They are written as tensors of their own all the same."""
    sizes, empty = [], torch.empty

    def page_locked(shape, dtype, pin_memory):
        sizes.append(shape[0])
        return empty(shape, dtype=dtype)

    wanted = {f"{number}": torch.randn(3, 7) for number in range(40)} | {"steps": torch.arange(5)}
    monkeypatch.setattr(host_copies.torch, "empty", page_locked)
    monkeypatch.setattr(host_copies, "_BLOCK", 1024)
    found = host_copies._page_locked({name: (one.shape, one.dtype) for name, one in wanted.items()})
    monkeypatch.undo()
    assert max(sizes) <= 1024
    assert len(sizes) == 6  # eight of 128 bytes in each
    for name, tensor in wanted.items():
        found[name].copy_(tensor)
    save_file(found, tmp_path / "copies")
    read = load_file(tmp_path / "copies")
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in wanted.items())
