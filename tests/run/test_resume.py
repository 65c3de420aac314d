"""Checkpoints and resume on real ranks: bit for bit at the same ranks, to rounding at others; every kind of damage."""

import errno
import json
import os
import re
import shutil
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.differences import differences
from sorsa_ds.config.schema import AdapterConfig, RegularizerConfig, RunConfig, TrainConfig
from sorsa_ds.model.adapter_file import CONFIG
from sorsa_ds.run.checkpoint import folder as folders
from sorsa_ds.run.checkpoint import manifest
from sorsa_ds.run.checkpoint.saved import SavedTensors
from sorsa_ds.runtime.errors import PeerError
from sorsa_ds.train.origin import ResumedRun
from tests.helpers.forked import launch_forked
from tests.helpers.projects import metrics, start
from tests.helpers.runs import GLOBAL, rewound, train, train_rank, trained
from tests.helpers.worlds import run_ranks

DROPOUT = "adapter.dropout=0.3"


@pytest.fixture(scope="module")
def whole(project):
    """A run that nothing has interrupted, with dropout: the random states count."""
    return train(project, "whole", DROPOUT, "train.micro_batch_size=1")[0]


@pytest.fixture(scope="module")
def plain(project):
    """A run without dropout, so that it does not depend on the number of ranks."""
    return train(project, "plain")[0]


@pytest.mark.slow
def test_a_stopped_run_over_a_packed_residual_goes_on_bit_for_bit(project, plain):
    """Refined factors too: the residual follows from the base model and the factors with which the run began."""
    packed = ["residual.storage=nf4_double", "residual.iterations=2", "train.max_start_gap=9"]
    expected, _ = train(project, "packed", *packed)
    run, said = train(project, "packed-stopped", *packed, stop_at=3)
    assert "stopped after step 3 of 6" in said
    with pytest.raises(AssertionError, match=r"residual.block_size was 64 and is now 128"):
        train(project, "packed-stopped", *packed, "residual.block_size=128", f"--resume={run}")
    train(project, "packed-stopped", *packed, "--resume=auto")
    assert metrics(run, "loss") == metrics(expected, "loss")
    ours, theirs = trained(run), trained(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    sizes = [sum(f.stat().st_size for f in (r / "checkpoints" / "step-000002").iterdir()) for r in (plain, expected)]
    assert sizes[1] < sizes[0] + 2000, "a checkpoint holds nothing of the residual"


@pytest.mark.slow
def test_auto_does_not_stand_for_another_storage(project, plain):
    train(project, "nf4", "residual.storage=nf4", "train.max_start_gap=9", stop_at=1)
    with pytest.raises(AssertionError, match=r"residual.storage was 'nf4' and is now 'fp32'"):
        train(project, "nf4", "--resume=auto")
    copy = rewound(project, plain, "plain-nf4", 2)
    with pytest.raises(AssertionError, match=r"residual.storage was 'fp32' and is now 'nf4'"):
        train(project, "plain-nf4", "residual.storage=nf4", f"--resume={copy}")


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(project, whole):
    """One rank of two gets the signal, in the middle of a step that is accumulated over three micro-batches."""
    run, said = train(project, "stopped", DROPOUT, "train.micro_batch_size=1", stop_at=3)
    assert "SIGUSR1: stopped after step 3 of 6" in said
    assert said.endswith(f"--resume {project / 'stopped'}")
    assert (run / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert not (run / "report.json").exists()
    train(project, "stopped", DROPOUT, "train.micro_batch_size=1", "--resume=auto")
    assert metrics(run, "loss") == metrics(whole, "loss")
    assert metrics(run, "learning_rate") == metrics(whole, "learning_rate")
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open())] == [0, 1, 2, 3, 4, 5, 6, 6]
    for name, tensor in trained(whole).items():
        assert torch.equal(trained(run)[name], tensor), name
    ends = [json.loads((r / "report.json").read_text()) for r in (run, whole)]
    for key in ("eval_loss_end", "eval_loss_start", "loss_last", "start_loss", "reg_loss_end"):
        assert ends[0][key] == ends[1][key], key


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_from_what_it_saved_on_its_way(project, whole):
    run = rewound(project, whole, "again", 4)
    train(project, "again", DROPOUT, "train.micro_batch_size=1", "--resume=auto")
    assert metrics(run, "loss") == metrics(whole, "loss")
    for name, tensor in trained(whole).items():
        assert torch.equal(trained(run)[name], tensor), name


@pytest.mark.slow
def test_without_the_random_states_dropout_would_differ(project, whole):
    """The tests above can fail: the same resume with other random states does not give the same losses."""
    run = rewound(project, whole, "reseeded", 4)
    for path in (run / "checkpoints" / "step-000004").glob("rank-*.safetensors"):
        tensors = load_file(path)
        tensors["random/torch"] = torch.get_rng_state()
        save_file(tensors, path)
    saved = manifest.read_manifest(run / "checkpoints" / "step-000004")
    for name in saved.files:
        path = run / "checkpoints" / "step-000004" / name
        saved.files[name] = {"bytes": path.stat().st_size, "digest": manifest.digest.of_file(path)}
    saved.write(run / "checkpoints" / "step-000004")
    train(project, "reseeded", DROPOUT, "train.micro_batch_size=1", "--resume=auto")
    assert metrics(run, "loss")[:4] == metrics(whole, "loss")[:4]
    assert metrics(run, "loss")[4:] != metrics(whole, "loss")[4:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [(1, "stage0", 4), (3, "zero2", None)],
        [(3, "zero1", 4), (2, "stage0", None)],
        [(3, "zero3_offload", 4), (1, "zero3", None)],
    ],
)
def test_a_run_goes_on_at_other_ranks_and_stages(project, plain, legs):
    name = f"moved-{legs[0][0]}-{legs[1][0]}"
    run = rewound(project, plain, name, 2)
    for ranks, ds, stop_at in legs:
        train(project, name, "--resume=auto", ranks=ranks, ds=ds, stop_at=stop_at)
    assert metrics(run, "loss") == pytest.approx(metrics(plain, "loss"), rel=1e-6)
    for name, tensor in trained(plain).items():
        assert (trained(run)[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_rounded_factors_go_on_from_their_masters(project, precision):
    settings = [f"train.precision={precision}", "train.max_start_gap=1"]
    run, _ = train(project, f"{precision}-whole", *settings, ds="zero2")
    again = rewound(project, run, f"{precision}-again", 4)
    train(project, again.name, *settings, "--resume=auto", ds="zero2")
    for name, tensor in trained(run).items():
        assert torch.equal(trained(again)[name], tensor), name


@pytest.mark.slow
def test_a_checkpoint_holds_twelve_bytes_a_trained_number_and_no_more(plain):
    path = plain / "checkpoints" / "step-000006"
    trainable = json.loads((plain / "report.json").read_text())["trainable_parameters"]
    files = list(path.glob("*.safetensors"))
    assert {f.name for f in path.iterdir()} == {"checkpoint.json", *(f.name for f in files)}
    tensors = [t for f in files for name, t in load_file(f).items() if not name.startswith("random/")]
    assert sum(t.nbytes for t in tensors) == 12 * trainable
    masters = SavedTensors(files)
    for name, tensor in trained(plain).items():
        assert torch.equal(masters.read("values", name, 0, tensor.numel()).view(tensor.shape), tensor)
        tail = masters.read("values", name, 1, tensor.numel() - 2)
        assert torch.equal(tail, tensor.flatten()[1:-1])


@pytest.mark.slow
def test_only_the_newest_are_kept(project):
    run, _ = train(project, "few", "output.save_every=1", "output.keep_checkpoints=2", ranks=1, ds="stage0")
    assert [path.name for path in folders.existing_checkpoints(run)] == ["step-000006", "step-000005"]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = {
    "truncated": lambda c: os.truncate(c / "rank-00001.safetensors", 1000),
    "is damaged": lambda c: _flip(c / "rank-00000.safetensors"),
    "cannot be read": lambda c: (c / "rank-00001.safetensors").unlink(),
    "not a checkpoint": lambda c: (c / "checkpoint.json").write_text("{"),
    "does not fit its digest": lambda c: _replace(c / "checkpoint.json", '"last_epoch": 4', '"last_epoch": 0'),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(project, plain, damage, capfd):
    run = rewound(project, plain, f"hurt-{damage}", 4)
    DAMAGES[damage](run / "checkpoints" / "step-000004")
    # The user names the damaged one: refused, with the good one offered.
    with pytest.raises(AssertionError, match=f"(?s){damage}.*--resume .*step-000002 is whole"):
        train(project, run.name, f"--resume={run / 'checkpoints' / 'step-000004'}")
    assert not (run / "report.json").exists()
    capfd.readouterr()
    train(project, run.name, "--resume=auto")
    told = capfd.readouterr().err
    assert damage in told
    assert "step-000004" in told
    assert metrics(run, "loss") == metrics(plain, "loss")
    assert list((run / "checkpoints").glob("set-aside-1-step-000004"))


def _train_on_a_full_disk(project, name, failing_steps):
    """Train like `train_rank`, but rank 1 finds no space for its file of some steps."""
    from sorsa_ds.run.checkpoint import saver
    from sorsa_ds.runtime import collectives

    def full(tensors, path):
        if collectives.rank() == 1 and int(path.parent.parent.name[6:12]) in failing_steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    saver.save_file = full
    arguments = ["train.steps=6", "output.save_every=2", "output.keep_checkpoints=9", GLOBAL]
    try:
        train_rank(project, name, "zero3", arguments, None)
    except (ValueError, PeerError) as error:
        return str(error)
    return None


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_checkpoint_before_it_stays(project, plain, capfd):
    assert run_ranks(2, _train_on_a_full_disk, project, "full", [4]) == [None, None]
    told = capfd.readouterr().err
    assert "the checkpoint of step 4 was not saved" in told
    assert "No space left on device" in told
    assert "step-000002 is still valid" in told
    run = project / "full"
    assert [path.name for path in folders.existing_checkpoints(run)] == ["step-000006", "step-000002"]
    assert metrics(run, "loss") == metrics(plain, "loss")
    _, told = run_ranks(2, _train_on_a_full_disk, project, "full-at-the-end", [6])
    assert re.search("No space left on device.*step-000004 is still valid", told)
    assert not (project / "full-at-the-end" / "report.json").exists()
    assert not list(project.glob("full*/checkpoints/.step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"step-000099\n", b"\xff\xfe\x00\x80"])
def test_latest_that_points_nowhere_is_told_and_the_newest_taken(project, plain, capfd, content):
    run = rewound(project, plain, f"nowhere-{content[0]}", 4)
    (run / "checkpoints" / "latest").write_bytes(content)
    train(project, run.name, "--resume=auto")
    assert "which is not there" in capfd.readouterr().err
    assert metrics(run, "loss") == metrics(plain, "loss")


@pytest.mark.slow
def test_all_checkpoints_damaged_is_an_error_and_nothing_is_overwritten(project, plain):
    run = rewound(project, plain, "ruined", 4)
    for path in folders.existing_checkpoints(run):
        _flip(path / "rank-00000.safetensors")
    with pytest.raises(AssertionError, match="no other checkpoint of this run is whole"):
        train(project, "ruined", "--resume=auto")
    assert len(metrics(run, "loss")) == 6


@pytest.mark.slow
def test_mistakes_are_named_before_anything_is_loaded(project, plain):
    run = rewound(project, plain, "mistaken", 4)
    with pytest.raises(AssertionError, match=r"adapter.rank was 4 and is now 3; train.learning_rate was 0.001"):
        train(project, "mistaken", f"--resume={run}", "adapter.rank=3", "train.learning_rate=0.5")
    with pytest.raises(AssertionError, match=r"does not divide among 4 ranks; take 1, 2, 3, 6"):
        train(project, "mistaken", f"--resume={run}", ranks=4)
    with pytest.raises(AssertionError, match="is finished"):
        train(project, "plain", "--resume=auto", ranks=1)
    with pytest.raises(AssertionError, match=r"there is no folder .*; the run's newest is .*step-000004"):
        train(project, "mistaken", f"--resume={run}/checkpoints/step-000005", ranks=1)
    with (run / ".lock").open("a") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AssertionError, match="still trains"):
            train(project, "mistaken", f"--resume={run}", ranks=1)
    other = shutil.copytree(project / "model", project / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"up_proj.weight is not the weight that was trained on"):
        train(project, "mistaken", f"--resume={run}", f"model={other}")


@pytest.mark.slow
def test_a_base_model_that_gives_other_numbers_is_named(project, plain):
    """The same weights, whose configuration or tokenizer has been changed since the run began."""
    copy = rewound(project, plain, "other-numbers", 2)
    kept = manifest.read_manifest(copy / "checkpoints" / "step-000002").numerics
    assert kept == json.loads((plain / "adapter" / CONFIG).read_text())["numerics"]
    model = shutil.copytree(project / "model", project / "other-model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    (model / "chat_template.jinja").write_text("another")
    told = r"--resume: .*other-model .*config.rms_norm_eps was 1e-06 and is 0.5 now; tokenizer.chat_template was"
    with pytest.raises(AssertionError, match=told):
        train(project, "other-numbers", f"model={model}", f"--resume={copy}")


def test_a_setting_that_is_unset_now_is_a_difference_unless_the_run_settles_it():
    saved = asdict(RunConfig(adapter=AdapterConfig(alpha=16), train=TrainConfig(steps=9, global_batch_size=8)))
    assert differences(RunConfig(), saved) == {"adapter.alpha": (16.0, None), "train.steps": (9, None)}


def test_true_is_no_number_of_accumulation_steps():
    saved = asdict(RunConfig(regularizer=RegularizerConfig(divide_by_accumulation=True)))
    now = RunConfig(regularizer=RegularizerConfig(divide_by_accumulation=1))
    assert differences(now, saved) == {"regularizer.divide_by_accumulation": (True, 1)}


@pytest.mark.parametrize(
    ("ranks", "asked", "expected"),
    [
        (2, "auto", 2),
        (2, None, 2),
        (4, "auto", "auto"),
        (4, None, 2),
        (8, None, 2),
        (16, None, 1),
        (2, 4, 4),
        (8, 3, 2),
    ],
)
def test_auto_is_the_runs_own_micro_batch_on_as_many_ranks_and_chosen_anew_on_others(ranks, asked, expected):
    """The run had 16 = 2 x 2 ranks x 4."""
    then = {"global_batch_size": 16, "micro_batch_size": 2, "gradient_accumulation_steps": 4}
    run = ResumedRun(SimpleNamespace(manifest=SimpleNamespace(config={"train": then})))
    found = run.split_batch(TrainConfig(micro_batch_size=asked), ranks)
    assert (found.global_batch_size, found.micro_batch_size) == (16, expected)
    assert found.gradient_accumulation_steps is None


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_a_number_of_positions_leaves_the_micro_batch_open(ranks):
    """What the run's own settings say of the micro-batch is what followed from its positions, on its ranks."""
    then = {"global_batch_size": 16, "micro_batch_size": 2, "gradient_accumulation_steps": 4}
    run = ResumedRun(SimpleNamespace(manifest=SimpleNamespace(config={"train": then})))
    now = TrainConfig(micro_batch_size=2, gradient_accumulation_steps=4, micro_batch_tokens=1024)
    found = run.split_batch(now, ranks)
    assert (found.global_batch_size, found.micro_batch_size, found.gradient_accumulation_steps) == (16, None, None)


@pytest.mark.slow
def test_a_run_of_the_largest_micro_batch_goes_on_bit_for_bit_and_at_other_ranks(project):
    """Six examples: 3 for each of two ranks, and 6 for one; the regulariser's coefficient stays what it was."""
    asked = ["train.micro_batch_size=auto", "regularizer.preset=reference", "regularizer.divide_by_accumulation=64"]
    run, _ = train(project, "auto-whole", *asked)
    again, alone = (rewound(project, run, name, 2) for name in ("auto-again", "auto-alone"))
    train(project, again.name, *asked, "--resume=auto")
    train(project, alone.name, *asked, "--resume=auto", ranks=1)
    for folder, split in ((run, (3, 1)), (again, (3, 1)), (alone, (6, 1))):
        kept = load_settings(RunConfig, folder / "config.yaml").train
        assert (kept.micro_batch_size, kept.gradient_accumulation_steps) == split
        assert kept.global_batch_size == 6
        told = json.loads((folder / "report.json").read_text())["regularizer"]
        assert told["coefficient"] == 4e-4 / 1e-3 / 64
    for name, tensor in trained(run).items():
        assert torch.equal(trained(again)[name], tensor), name
    assert metrics(alone, "loss") == pytest.approx(metrics(run, "loss"), rel=1e-6)


@pytest.mark.slow
def test_other_data_and_evaluations_on_the_way(project, plain):
    """The data are compared by digest; an evaluation that a kill has prevented is made when the run goes on."""
    lines = (project / "data.jsonl").read_text().splitlines(keepends=True)
    run = rewound(project, plain, "evaluated", 4)
    (project / "data.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(AssertionError, match="the training examples are not those"):
        train(project, "evaluated", "--resume=auto", ranks=1)
    (project / "data.jsonl").write_text("".join(lines))
    train(project, "evaluated", "--resume=auto", "train.eval_every=4")
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "eval_loss" in line] == [
        0,
        4,
        6,
    ]


def _refused(project, name, arguments):
    """What stops this rank of a run."""
    from sorsa_ds.runtime.errors import PeerError

    try:
        train_rank(project, name, "zero2", arguments, None)
    except (ValueError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.slow
def test_a_log_that_rank_0_cannot_read_stops_every_rank(project, plain):
    run = rewound(project, plain, "unreadable", 4)
    (run / "metrics.jsonl").write_text("{\n")
    first, second = run_ranks(2, _refused, project, "unreadable", ["train.steps=6", GLOBAL, "--resume=auto"])
    assert first.startswith("ValueError") and "line 1: not JSON" in first
    assert second.startswith("PeerError: stopped because another rank failed: rank 0") and "line 1: not JSON" in second


@pytest.mark.slow
def test_auto_begins_anew_where_there_is_nothing_to_go_on_with(project, plain):
    run, _ = train(project, "fresh", "--resume=auto", ranks=1, ds="stage0")
    assert metrics(run, "loss") == pytest.approx(metrics(plain, "loss"), rel=1e-6)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_a_signal_ends_with_the_documented_code(project):
    """Through the real launcher: SIGKILL of one rank, then --resume auto, then SIGTERM to one rank."""
    import psutil

    def ranks_after_step(process, wanted):
        for line in process.stdout:
            shown = re.search(r"training:.*?(\d+)/60 ", line)  # a fast machine's bar leaves steps out
            if shown and int(shown[1]) >= wanted:
                tree = psutil.Process(process.pid).children(recursive=True)
                return sorted((p for p in tree if "launch/train.py" in p.cmdline()[1:3]), key=lambda p: p.pid)
        raise AssertionError("the run ended too early")

    arguments = ["train.steps=60", "output.save_every=1", "--resume=auto"]
    process = start(project, "killed", *arguments)
    ranks_after_step(process, 4)[-1].kill()
    process.communicate(timeout=60)
    assert process.returncode not in (0, 75)
    process = start(project, "killed", *arguments)
    ranks_after_step(process, 9)[0].terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed[-3000:]
    assert "SIGTERM: stopped after step" in printed
    process = start(project, "killed", *arguments)
    ranks = ranks_after_step(process, 14)
    process.terminate()  # DeepSpeed's own command, which passes nothing on
    assert process.wait(60) == -signal.SIGTERM
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    assert 14 <= folders.step_of(folders.existing_checkpoints(project / "killed")[0]) < 60
    printed, run, _ = launch_forked(project, "killed", *arguments, "output.save_every=20")
    assert "Going on after step" in printed
    assert len(metrics(run, "loss")) == 60


@pytest.mark.slow
def test_columns_keep_their_rates_when_a_stopped_run_goes_on_also_at_other_ranks(project):
    """Rates follow from the singular values with which training began, and not from those of the checkpoint."""
    rates = ["sorsa.triplets=trailing", "sorsa.column_rates=inverse", "sorsa.s_lr_ratio=200", "train.max_start_gap=9"]
    expected, _ = train(project, "rates", *rates)
    run, _ = train(project, "rates-stopped", *rates, stop_at=3)
    train(project, "rates-stopped", *rates, "--resume=auto")
    assert metrics(run, "loss") == metrics(expected, "loss")
    elsewhere, _ = train(project, "rates-elsewhere", *rates, stop_at=3)
    train(project, "rates-elsewhere", *rates, "--resume=auto", ranks=1, ds="stage0")
    for name, tensor in trained(expected).items():
        assert torch.equal(trained(run)[name], tensor), name
        torch.testing.assert_close(trained(elsewhere)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_rate_that_was_left_open_is_found_once_and_kept(project):
    """The number stands in the run's settings, and a run that goes on takes it from there."""
    open_rate = ["train.learning_rate=auto", "sorsa.column_rates=inverse_sqrt"]
    expected, _ = train(project, "auto", *open_rate)
    rate = load_settings(RunConfig, expected / "config.yaml", []).train.learning_rate
    s_rms = [layer["s_rms"] for layer in json.loads((expected / "init.json").read_text())["layers"]]
    begun = load_file(expected / "adapter" / "initial_factors.safetensors")
    by_hand = [s.double().square().mean().sqrt() for name, s in begun.items() if name.endswith(".s")]
    assert sorted(s_rms) == pytest.approx(sorted(float(s) for s in by_hand), rel=1e-5)
    ranks = [len(s) for name, s in begun.items() if name.endswith(".s")]
    mean = sum(0.5 * (s.log() + torch.tensor(r).log()) for s, r in zip(by_hand, ranks, strict=True)) / len(ranks)
    assert rate == pytest.approx(0.1 / (float(mean.exp()) * len(ranks) ** 0.5), rel=0.05)
    assert max(metrics(expected, "learning_rate")) == pytest.approx(rate)
    run, _ = train(project, "auto-stopped", *open_rate, stop_at=3)
    with pytest.raises(AssertionError, match=r"train.learning_rate was .* and is now 0.5"):
        train(project, "auto-stopped", "train.learning_rate=0.5", "sorsa.column_rates=inverse_sqrt", f"--resume={run}")
    train(project, "auto-stopped", *open_rate, "--resume=auto")
    assert metrics(run, "loss") == metrics(expected, "loss")
    assert load_settings(RunConfig, run / "config.yaml", []).train.learning_rate == rate
