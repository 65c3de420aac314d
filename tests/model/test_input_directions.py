"""The file of input directions: what it gives back, and every way in which it does not fit a model."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sorsa_ds.model.input_directions import Directions, InputDirections, Origin, probe_of, write_directions
from sorsa_ds.model.targets import Target

M, N, K = 512, 256, 6


@pytest.fixture
def weight():
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path, weight):
    """Directions of one linear, `q`."""
    directions = torch.linalg.qr(torch.randn(N, K, generator=torch.Generator().manual_seed(1)))[0].t().contiguous()
    path = tmp_path / "directions.safetensors"
    write_directions(path, {"q": Directions(directions, probe_of("q", weight))}, Origin("BASE", "texts", 9))
    return path


def target(name="q", inputs=N, rank=4, experts=0):
    return Target(name, M, inputs, rank, bias=False, transposed=False, experts=experts)


def test_the_first_directions_come_back_for_the_weight_they_were_made_for(file, weight):
    found = InputDirections(str(file))
    found.check([target()])
    all_of_them = found.of("q", weight, K)
    torch.testing.assert_close(all_of_them @ all_of_them.t(), torch.eye(K))
    torch.testing.assert_close(found.of("q", weight, 4), all_of_them[:4], rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(found.of("q", weight.to(dtype), 4), all_of_them[:4], rtol=0, atol=0)


def test_a_rounded_weight_is_far_within_the_tolerance(weight):
    for dtype in (torch.bfloat16, torch.float16):
        off = (probe_of("q", weight.to(dtype)) - probe_of("q", weight)).norm() / probe_of("q", weight).norm()
        assert 1e-5 < off < 2e-3


def test_another_weight_is_refused_also_one_that_was_trained_a_little(file, weight):
    """A gradient step is a sum of g x^T, with x in the directions that are used: W d tells nothing of it."""
    directions = InputDirections(str(file)).of("q", weight, K)
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(2))
    x -= x @ directions.t() @ directions
    step = torch.randn(M, 4, generator=torch.Generator().manual_seed(3)) @ x
    assert (step @ directions.t()).norm() < 1e-3
    trained = weight + 0.02 * step * (weight.norm() / step.norm())
    for changed in (trained, -weight, weight.roll(1, 0), 1.1 * weight, weight[:-1]):
        with pytest.raises(ValueError, match="was made from BASE, whose q has other weights"):
            InputDirections(str(file)).of("q", changed, K)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (target("k"), "has no input directions of k: it was made from BASE"),
        (target(inputs=N + 1), f"BASE, whose q has {N} inputs, and here it has {N + 1}"),
        (target(rank=K + 1), f"has {K} directions of q, and rank {K + 1} takes as many as that.*--rank {K + 1}"),
        (target(experts=4), "q holds experts, whose inputs are not measured"),
    ],
)
def test_layers_that_the_file_does_not_fit_are_named(file, asked, said):
    with pytest.raises(ValueError, match=said):
        InputDirections(str(file)).check([target(), asked])


def test_files_of_another_kind_are_refused(tmp_path, file):
    with pytest.raises(ValueError, match="sorsa.directions=.*absent: there is no such file"):
        InputDirections(str(tmp_path / "absent"))
    (tmp_path / "cut").write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="sorsa.directions=.*cut cannot be read"):
        InputDirections(str(tmp_path / "cut"))
    save_file({"q.directions": torch.zeros(K, N)}, tmp_path / "foreign", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is no file of directions; `sorsa calibrate` writes one"):
        InputDirections(str(tmp_path / "foreign"))


@pytest.mark.parametrize("damage", ["no probe", "flat", "not orthonormal"])
def test_files_that_are_damaged_are_refused_by_name(file, weight, damage):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    if damage == "no probe":
        del tensors["q.probe"]
    elif damage == "flat":
        tensors["q.directions"] = tensors["q.directions"][0]
    else:
        tensors["q.directions"] *= 2
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged: .* q"):
        InputDirections(str(file)).of("q", weight, 4)
