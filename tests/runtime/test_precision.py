"""Which precision is chosen on which hardware, and how cores are shared."""

import os
import subprocess
import sys

import pytest
import torch

from sorsa_ds.runtime import precision
from sorsa_ds.runtime.precision import resolve_precision, set_offload_threads, set_threads
from tests.helpers.projects import ROOT


@pytest.fixture
def hardware(monkeypatch):
    """Pretend to be a machine: hardware(amx=..., avx=..., gpu_bf16=...)."""

    def pretend(amx: bool = False, avx: bool = False, gpu_bf16: bool = False) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")

    return pretend


@pytest.mark.parametrize(
    ("machine", "device", "name"),
    [
        ({}, "cpu", "fp32"),
        ({"amx": True}, "cpu", "mixed"),
        ({"avx": True}, "cpu", "mixed"),
        ({"gpu_bf16": True}, "cuda", "mixed"),
        ({"avx": True}, "cuda", "fp32"),
    ],
)
def test_auto_goes_by_the_hardware(hardware, machine, device, name):
    hardware(**machine)
    chosen = resolve_precision("auto", None, device)
    assert chosen.name == name
    assert chosen.why.startswith(f"Precision {name} (chosen): ")


def test_probes_that_this_torch_lacks_count_as_no(hardware, monkeypatch):
    hardware(amx=True, avx=True)
    for probe in precision._CPU_PROBES.values():
        monkeypatch.delattr(torch.cpu, probe)
    assert resolve_precision("auto", None, "cpu").name == "fp32"


def test_dtypes_of_each_precision(hardware):
    hardware(avx=True)
    dtypes = {
        name: (p.compute_dtype, p.residual_dtype, p.factor_dtype)
        for name in ("fp32", "mixed", "bf16")
        for p in [resolve_precision(name, None, "cpu")]
    }
    assert dtypes == {
        "fp32": (torch.float32, torch.float32, torch.float32),
        "mixed": (torch.bfloat16, torch.bfloat16, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    }


def test_json_decides_where_the_setting_is_auto(hardware):
    hardware()
    chosen = resolve_precision("auto", "bf16", "cpu")
    assert chosen.name == "bf16"
    assert "as the DeepSpeed JSON asks" in chosen.why
    assert "slow" in chosen.why


def test_setting_and_json_may_not_differ(hardware):
    hardware(avx=True)
    assert resolve_precision("bf16", "bf16", "cpu").name == "bf16"
    with pytest.raises(ValueError, match=r"train\.precision is fp32, but the DeepSpeed JSON asks for bf16"):
        resolve_precision("fp32", "bf16", "cpu")


@pytest.mark.parametrize("name", ["mixed", "bf16"])
def test_gpu_without_bf16_refuses(hardware, name):
    hardware()
    with pytest.raises(ValueError, match=f"precision {name} needs a GPU with bf16, but Some GPU does not"):
        resolve_precision(name, None, "cuda")


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize(("ranks", "threads"), [(1, 6), (2, 3), (4, 1), (16, 1)])
def test_cores_are_shared_among_ranks(monkeypatch, ranks, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(precision.psutil, "cpu_count", lambda logical=True: 8)
    assert set_threads(ranks) == threads == torch.get_num_threads()


@pytest.mark.usefixtures("threads_restored")
def test_omp_num_threads_wins(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert set_threads(1) == 2


@pytest.fixture
def eight_cores(monkeypatch, threads_restored):
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(precision.psutil, "cpu_count", lambda logical=True: 8)


@pytest.mark.usefixtures("eight_cores")
def test_an_optimizer_on_the_cpu_gets_the_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "with 4 threads per rank (of 8 cores for 2 ranks)" in set_offload_threads(2)
    assert torch.get_num_threads() == 4
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "with 3 threads per rank (as OMP_NUM_THREADS=3 says)" in set_offload_threads(2)
    assert torch.get_num_threads() == 3


@pytest.mark.slow
@pytest.mark.parametrize(("omp", "threads"), [(None, 4), ("1", 1), ("2", 2)])
def test_torchruns_own_number_of_threads_is_told_from_the_users(tmp_path, omp, threads):
    """torchrun sets OMP_NUM_THREADS=1 for its ranks where it is not set."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, torch\n"
        "from sorsa_ds.runtime import precision\n"
        "precision._cores = lambda: 8\n"
        "precision.set_offload_threads(2)\n"
        f"told = f\"{{os.environ['OMP_NUM_THREADS']}} {{torch.get_num_threads()}}\"\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(told)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"OMP_NUM_THREADS": omp} if omp else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    for rank in ("0", "1"):
        assert (tmp_path / rank).read_text() == f"{omp or 1} {threads}"
