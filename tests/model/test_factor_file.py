"""What was trained is read only where it can be that: floating-point, finite; and what was not checked is said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sorsa_ds import load_adapter
from sorsa_ds.evaluate.models import find_evaluated_model
from sorsa_ds.export.command import export
from sorsa_ds.export.options import Options
from sorsa_ds.model import adapter_file
from sorsa_ds.model.adapter_file import INITIAL, TRAINED, FactorFile
from sorsa_ds.run.checkpoint.saved import SavedTensors
from sorsa_ds.study.analysis.history import open_history
from tests.helpers.architectures import save
from tests.helpers.finished import finished_run

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    return finished_run(save("llama", root / "base"), root / "run")


@pytest.fixture
def run(original, tmp_path):
    """A finished run to damage."""
    return shutil.copytree(original, tmp_path / "run")


def spoil(run, name, leaf, change):
    """Change one factor of a file of the run's adapter, and write the digests anew."""
    path = run / "adapter" / name
    factors = load_file(path)
    factors[f"{LAYER}.{leaf}"] = change(factors[f"{LAYER}.{leaf}"]).contiguous()
    save_file(factors, path)
    adapter_file.record_digests(run / "adapter")


def with_one(value):
    def change(factor):
        factor.view(-1)[3 % factor.numel()] = value
        return factor

    return change


BAD = {
    "NaN": (with_one(float("nan")), "holds NaN or Inf"),
    "Inf": (with_one(float("inf")), "holds NaN or Inf"),
    "too large for fp32": (lambda x: x.double() * 1e300, "holds NaN or Inf"),
    "int8": (lambda x: (x * 100).to(torch.int8), "is stored as int8"),
    "int64": (lambda x: (x * 100).long(), "is stored as int64"),
    "bool": (lambda x: x > 0, "is stored as bool"),
    "complex": (lambda x: x.to(torch.complex64), "is stored as complex64"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn"),
}
READERS = {
    "load_adapter": lambda run: load_adapter(run / "adapter"),
    "merged": lambda run: export(Options(run, "merged", run.parent / "out")),
    "lora": lambda run: export(Options(run, "lora", run.parent / "out")),
    "adapter": lambda run: export(Options(run, "adapter", run.parent / "out")),
    "evaluate": lambda run: find_evaluated_model(str(run)).load(torch.device("cpu"), None),
}


@pytest.mark.parametrize("bad", BAD)
def test_numbers_that_no_training_leaves_are_refused(run, bad):
    change, told = BAD[bad]
    spoil(run, TRAINED, "U", change)
    with pytest.raises(ValueError, match=rf"{TRAINED}: {LAYER}.U {told}"):
        load_adapter(run / "adapter")


@pytest.mark.parametrize("file", [INITIAL, TRAINED])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_them(run, reader, file):
    spoil(run, file, "s", with_one(float("nan")))
    with pytest.raises(ValueError, match=rf"{file}: {LAYER}.s holds NaN or Inf"):
        READERS[reader](run)
    assert not (run.parent / "out").exists()


def test_a_snapshot_is_read_as_carefully(run, monkeypatch):
    monkeypatch.setattr("sorsa_ds.study.analysis.history._check_report", lambda *_: None)
    spoil(run, TRAINED, "V", with_one(float("inf")))
    history = open_history(run)
    [target] = [target for target in history.linears if target.name == LAYER]
    with pytest.raises(ValueError, match="V holds NaN or Inf"):
        history.weight(target, history.steps[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_read_as_fp32(run, dtype):
    path = run / "adapter" / TRAINED
    wanted = load_file(path)[f"{LAYER}.U"].to(dtype)
    spoil(run, TRAINED, "U", lambda factor: factor.to(dtype))
    read = FactorFile(path).tensor(f"{LAYER}.U")
    assert read.dtype == torch.float32
    assert torch.equal(read, wanted.float())


def test_missing_digests_are_said(run, capsys):
    load_adapter(run / "adapter")
    assert f"has no digest of {INITIAL}, {TRAINED}: whether" in capsys.readouterr().out
    adapter_file.record_digests(run / "adapter")
    load_adapter(run / "adapter")
    assert "has no digest" not in capsys.readouterr().out
    path = run / "adapter" / adapter_file.CONFIG
    described = json.loads(path.read_text())
    kept = {name: value for name, value in described["digests"].items() if "norm" not in name}
    path.write_text(json.dumps({**described, "digests": kept}))
    for read in (lambda: load_adapter(run / "adapter"), lambda: open_history(run)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sorsa_ds.study.analysis.history._check_report", lambda *_: None)
            read()
        assert "has no digest of 5 of 21 parameters of the base model: whether" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.tensor([1.0, float("nan")]), r"a.U holds NaN or Inf"),
        (torch.tensor([1, 2]), r"values/a.U@0 is stored as I64, not as F32"),
        (torch.tensor([1.0, 2.0]).bfloat16(), r"is stored as BF16, not as F32"),
    ],
)
def test_a_checkpoint_is_read_as_carefully(tmp_path, tensor, told):
    save_file({"values/a.U@0": tensor}, tmp_path / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=told):
        SavedTensors([tmp_path / "rank-00000.safetensors"]).values("a.U", torch.Size([2]))
