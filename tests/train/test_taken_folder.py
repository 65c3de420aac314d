"""A run whose folder is taken away stops at its next save and touches nothing of the run that is there now."""

import json
import re
import shutil

import pytest

from tests.helpers.projects import settings
from tests.helpers.worlds import run_ranks


def _train_while(happens, project, name, more):
    """One rank of a run; before its fourth step rank 0 lets something happen to its folder. Returns what stopped it."""
    from sorsa_ds.runtime import collectives
    from sorsa_ds.train.options import parse
    from sorsa_ds.train.setup import assemble

    trainer = assemble(parse([*settings(project, name), "--ds_config=ds_configs/zero2.json", *more]))
    step = type(trainer).step

    def interrupted(self, number):
        if number == 3:
            self.keeper.finish_saving()
            if collectives.rank() == 0:
                happens(self.folder)
        return step(self, number)

    type(trainer).step = interrupted
    try:
        trainer.train()
    except (ValueError, collectives.PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _another_begins(folder):
    """A run of the same name, which has trained further than the old one."""
    for step in (50, 51):
        saved = folder / "checkpoints" / f"step-{step:06d}"
        saved.mkdir(parents=True)
        (saved / "checkpoint.json").write_text("{}")
    (folder / "checkpoints" / "latest").write_text("step-000051\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 51, "loss": 1.0}) + "\n")
    (folder / ".lock").touch()


def _replaced(folder):
    folder.rename(folder.with_name("moved"))
    _another_begins(folder)


def _removed(folder):
    shutil.rmtree(folder)


def _content(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["every save", "a snapshot", "the end"])
def test_a_run_whose_name_another_run_has_stops_and_leaves_that_one_alone(project, tmp_path, way):
    more = {
        "every save": ["output.save_every=2", "output.keep_checkpoints=1"],
        "a snapshot": ["output.save_every=0", "analysis.every=4"],
        "the end": ["output.save_every=0"],
    }[way]
    more.append(f"output.folder={tmp_path}")
    first, second = run_ranks(2, _train_while, _replaced, project, "run", more)
    assert first.startswith(
        f"ValueError: {tmp_path}/run was renamed to {tmp_path}/moved while this process worked in it"
    )
    assert re.search(rf"; to go on with the run: python .* --resume {tmp_path}/moved$", first)
    assert second.startswith("PeerError: stopped because another rank failed: rank 0: ValueError")
    (tmp_path / "fresh").mkdir()
    _another_begins(tmp_path / "fresh")
    assert _content(tmp_path / "run") == _content(tmp_path / "fresh")
    if way == "every save":
        assert (tmp_path / "moved" / "checkpoints" / "latest").read_text() == "step-000002\n"


@pytest.mark.slow
def test_a_run_whose_folder_is_removed_stops_and_makes_none_anew(project, tmp_path):
    more = ["output.save_every=2", "analysis.every=2", f"output.folder={tmp_path}"]
    first, _ = run_ranks(2, _train_while, _removed, project, "run", more)
    assert first == f"ValueError: {tmp_path}/run was removed while this process worked in it; nothing more is written"
    assert not (tmp_path / "run").exists()
