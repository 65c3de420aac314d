"""Fixtures shared by the tests."""

import functools
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sorsa_ds.runtime.call_stack import call_with_room
from sorsa_ds.runtime.garbage import collect_garbage_rarely

# What the helpers assert is explained as in the tests themselves.
pytest.register_assert_rewrite("tests.helpers")

# As the ranks that tests fork: sums in another order would not be equal bit for bit.
torch.set_num_threads(1)

collect_garbage_rarely()  # as in every command

# Asking whether there is a GPU must not start CUDA here: the tests fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, unless the tests of GPUs are asked for by themselves (`pytest -m gpu`).

    The other tests compute on the CPU and fork. A process that has started CUDA must not fork, and importing peft or
    bitsandbytes starts it where a GPU can be seen.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"
    # A shell starts what it runs in the background with Ctrl-C ignored, and all that the tests start would inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "run/test_resume.py", "launch/test_commands.py", "methods/test_methods.py", "engine/test_engine.py",
    "cluster/test_slurm.py", "cluster/test_hosts.py", "evaluate/test_sandbox.py", "plan/test_plan.py",
    "engine/test_multinode_sharding.py", "sorsa/test_residual.py", "engine/test_reorthonormalize.py",
)  # fmt: skip
"""Files that take longest. They come first, so that pytest-xdist's processes end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; the tests of a file stay as they are. What those marked slow cover is not measured.

    Tracing makes Python 3.11 half as slow again, and what these tests run is mostly in processes of their own.
    """
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.no_cover)
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Let pytest call the test as commands call what they do, with room on Python's stack."""
    test = pyfuncitem.obj
    # With the test's own name and code: pytest's reports of failures begin there.
    pyfuncitem.obj = functools.update_wrapper(functools.partial(call_with_room, test), test)


@pytest.fixture(autouse=True)
def _no_process_group_is_left_here() -> Iterator[None]:
    """Stop at a test that starts a process group in pytest's own process: those of ranks that it forks would hang."""
    yield
    assert not torch.distributed.is_initialized(), "start process groups in ranks of their own: tests.helpers.worlds"


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory) -> Path:
    """A folder that all of pytest-xdist's processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(common_folder) -> None:
    """Converted models and decompositions are kept with the tests' other files, not in the user's cache."""
    os.environ.setdefault("SORSA_CACHE", str(common_folder / "cache"))


@pytest.fixture(scope="session")
def conversion(common_folder) -> tuple[Path, list[list[str]]]:
    """A cache with nothing but the converted embedded model, and what the conversion told each of two ranks."""
    from tests.helpers.embedded_model import convert_once

    cache = common_folder / "converted"
    return cache, convert_once(cache)


@pytest.fixture(scope="session")
def embedded_model(conversion) -> Path:
    """The embedded model's folder, in the cache in which every command looks for it."""
    from sorsa_ds.runtime.cache import cache_folder

    [converted] = (path for path in conversion[0].iterdir() if path.is_dir())
    folder = cache_folder() / converted.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.symlink_to(converted)
    return folder


@pytest.fixture(scope="session")
def small_real_model(embedded_model, tmp_path_factory) -> Path:
    """Two layers of the embedded model, with its tokenizer."""
    from tests.helpers.embedded_model import first_layers

    return first_layers(embedded_model, tmp_path_factory.mktemp("small_real_model"))


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A small real project on disk (`projects`); `project` is a copy to work in."""
    from tests.helpers import projects

    return projects.make(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def project(untrained, tmp_path_factory) -> Path:
    """A module's own copy of the small real project: the names of its runs are free, whatever ran before."""
    return Path(shutil.copytree(untrained, tmp_path_factory.mktemp("project") / "project"))


@pytest.fixture(scope="session")
def answering(tmp_path_factory) -> Path:
    """A project whose model has learned to answer (`evaluated`); `trained` is a copy to work in."""
    from tests.helpers import evaluated

    return evaluated.make(tmp_path_factory.mktemp("answering"))


@pytest.fixture(scope="module")
def trained(answering, tmp_path_factory) -> Path:
    """A module's own copy of the project whose model has learned to answer."""
    return Path(shutil.copytree(answering, tmp_path_factory.mktemp("trained") / "project"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama on disk, weights large enough that the loss has something to say."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["namespaces", "user"])
def sandbox(request):
    """A sandbox behind each kind of walls (`sandboxes`)."""
    from tests.helpers.sandboxes import sandbox_or_skip

    return sandbox_or_skip(request.param)


@pytest.fixture
def nothing_is_left():
    """No process of a program is there when a test is over."""
    import psutil

    from tests.helpers.sandboxes import see_that_nothing_is_left

    before = set(psutil.pids())
    yield
    see_that_nothing_is_left(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data beside the repository.

    What it shows is an extra: each test that takes it stands beside one on the embedded model or on data made here.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real models and data of {folder}, which is absent")
    return folder
