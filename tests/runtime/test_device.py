"""The device of a process: one answer for all rooms, and no silent training on a CPU beside a GPU."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sorsa_ds.cli.train import _train
from sorsa_ds.runtime import device
from tests.structure import modules

ROOT = Path(__file__).resolve().parents[2]
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\nGCC version: 12\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of which everything that tells of a GPU can be set; it shows none, and torch is built for CUDA 13.0."""
    device._refuse_unseen_gpu.cache_clear()
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(device, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    yield tmp_path
    device._refuse_unseen_gpu.cache_clear()


def test_a_machine_without_gpu_computes_on_the_cpu(machine):
    assert device.device_type() == "cpu" and device.this_device() == torch.device("cpu")


def test_a_gpu_under_an_old_driver_is_refused_with_driver_cuda_and_mend(machine):
    (machine / "version").write_text(DRIVER.format("535.104.05"))
    (machine / "nvidia0").touch()
    with pytest.raises(
        ValueError, match=r"driver 535\.104\.05.* CUDA 13\.0.*driver for CUDA 13 \(driver 580 or newer\)"
    ):
        device.device_type()


def test_a_gpu_that_only_nvidia_smi_shows_is_refused(machine):
    (machine / "nvidia-smi").write_text("#!/bin/sh\necho 550.54.14\n")
    (machine / "nvidia-smi").chmod(0o755)
    with pytest.raises(ValueError, match=r"driver 550\.54\.14"):
        device.device_type()


def test_a_device_file_alone_is_refused(machine):
    (machine / "nvidiactl").touch()
    assert device.device_type() == "cpu"  # a driver without a GPU
    device._refuse_unseen_gpu.cache_clear()
    (machine / "nvidia3").touch()
    with pytest.raises(ValueError, match="driver unknown"):
        device.device_type()


def test_torch_without_cuda_beside_a_gpu_is_told_apart(machine, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    (machine / "version").write_text(DRIVER.format("580.65.06"))
    with pytest.raises(ValueError, match=r"built without CUDA; install torch with CUDA .*DS_ACCELERATOR=cpu"):
        device.device_type()


@pytest.mark.parametrize(("variable", "value"), [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_who_asks_for_the_cpu_gets_it(machine, monkeypatch, variable, value):
    (machine / "nvidia0").touch()
    monkeypatch.setenv(variable, value)
    assert device.device_type() == "cpu"


def test_a_wrong_list_of_gpus_is_named(machine, monkeypatch):
    (machine / "version").write_text(DRIVER.format("580.65.06"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=9 may name a GPU that is not there"):
        device.device_type()


@pytest.mark.parametrize(("asked", "told"), [("cuda", "shows no NVIDIA GPU"), ("xpu", "computes on cuda or on cpu")])
def test_an_accelerator_that_is_not_there_is_refused(machine, monkeypatch, asked, told):
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    with pytest.raises(ValueError, match=told):
        device.device_type()


def test_a_visible_gpu_is_taken_by_local_rank_unless_the_cpu_is_asked_for(machine, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.this_device() == torch.device("cuda", 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device.this_device() == torch.device("cpu")


def test_no_other_module_asks_torch_whether_there_is_a_gpu():
    asking = [path.name for path in modules() if "cuda.is_available" in path.read_text(encoding="utf-8")]
    assert asking == ["device.py"]


@pytest.fixture
def allocator(monkeypatch):
    """No variable of the allocator is set, nor stays set after the test."""
    for name in device.ALLOCATOR:
        monkeypatch.setenv(name, "")
    return monkeypatch


def test_the_allocator_grows_its_segments_unless_the_user_has_set_it_up_or_it_is_too_late(allocator):
    device.grow_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in device.ALLOCATOR:
        allocator.setenv("PYTORCH_ALLOC_CONF", "")
        allocator.setenv(name, "max_split_size_mb:64")
        device.grow_segments()
        assert os.environ[name] == "max_split_size_mb:64"
        assert "expandable" not in os.environ["PYTORCH_ALLOC_CONF"]
        allocator.setenv(name, "")
    allocator.setattr("torch.cuda.is_initialized", lambda: True)
    device.grow_segments()
    assert not os.environ["PYTORCH_ALLOC_CONF"]


def test_training_sets_up_the_allocator_before_it_imports_what_may_start_cuda(allocator):
    class Imported(types.ModuleType):
        def __getattr__(self, name):
            if name == "show_report":  # the first that is imported then
                raise ImportError(os.environ["PYTORCH_ALLOC_CONF"])
            raise AttributeError(name)

    allocator.setattr("sorsa_ds.cli.train.leave_when_told", lambda: None)
    allocator.setattr("sorsa_ds.train.first_checks.on_one_node", lambda: False)
    allocator.setattr("sorsa_ds.train.options.parse", lambda _: types.SimpleNamespace(verbose=False))
    allocator.setitem(sys.modules, "sorsa_ds.train.report", Imported("sorsa_ds.train.report"))
    with pytest.raises(ImportError, match="expandable_segments:True"):
        _train([])


def test_only_a_gpu_has_cached_memory_to_return(monkeypatch):
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    device.return_cached_memory(torch.device("cpu"))
    assert emptied == []
    device.return_cached_memory(torch.device("cuda", 1))
    assert emptied == [True]


def test_the_memory_of_a_gpu_is_told_by_torch(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (30, 80))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 20)
    assert device.gpu_memory() == device.GpuMemory(total=80, free=30, held=20)


FAKE_CUDA = '''
"""A machine with two GPUs, as far as that can be pretended: torch sees them unless the environment hides them."""
import os
import torch

def _visible():
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 2

def _started(*_, **__):
    raise RuntimeError("CUDA was started")

torch.cuda.is_available = lambda: _visible() > 0
torch.cuda.device_count = _visible
torch.cuda._lazy_init = _started
'''
LOOK = """
import os, torch, pytest
from tests.helpers.worlds import run_ranks

def _sum():
    from sorsa_ds.runtime.device import this_device
    return this_device().type, torch.distributed.get_backend()

def test_forks():
    import peft
    assert run_ranks(2, _sum) == [("cpu", "gloo")] * 2

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    from sorsa_ds.runtime.device import this_device
    assert this_device().type == "cuda" and torch.cuda.device_count() == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marks", "counted"),
    [([], "1 passed, 1 skipped"), (["-m", "not slow"], "1 passed, 1 skipped"), (["-m", "gpu"], "1 passed, 1 desel")],
)
def test_on_a_machine_with_gpus_the_tests_fork_on_the_cpu_and_those_of_gpus_see_them(tmp_path, marks, counted):
    (tmp_path / "fake_cuda.py").write_text(FAKE_CUDA)
    (tmp_path / "test_look.py").write_text(LOOK)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "fake_cuda", "-p", "tests.conftest", "-p", "no:cacheprovider",
         "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *marks, str(tmp_path / "test_look.py")],
        cwd=ROOT, text=True, capture_output=True, check=False,
        env={**environment, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert counted in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
