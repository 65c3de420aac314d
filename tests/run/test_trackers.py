"""Trackers: what they get, and that none of them can hold a run up or end it."""

import threading
import time

import pytest
from accelerate import tracking

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.watch_settings import OutputConfig
from sorsa_ds.run import tracker_kinds, trackers
from sorsa_ds.run.samples import Sample
from sorsa_ds.run.tracker_kinds import KINDS, check_installed, markdown
from sorsa_ds.run.trackers import Trackers

SAMPLE = Sample("data", 0, "What?", "So.", "Well |\n<b>", True)


class Recording:
    """One of accelerate's trackers, as far as a run uses it."""

    made: list["Recording"] = []  # noqa: RUF012 (each test has its own list)

    def __init__(self, **arguments):
        self.arguments, self.logged, self.given, self.finished = arguments, [], None, False
        self.made.append(self)

    def start(self):
        self.thread = threading.current_thread()

    def store_init_configuration(self, values):
        self.given = values

    def log(self, values, step):
        self.logged.append((step, values))

    def log_table(self, name, columns, data, step):
        self.logged.append((step, name, columns, data))

    def finish(self):
        self.finished = True

    @property
    def tracker(self):
        return self

    id = "given-by-the-tracker"


@pytest.fixture
def recording(monkeypatch):
    """Makes two trackers record instead, whether they are installed or not; returns what is made."""
    monkeypatch.setattr(Recording, "made", [])
    for name in ("clearml", "trackio"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Recording)
    monkeypatch.setattr(tracker_kinds.importlib.util, "find_spec", lambda name: name)
    return Recording.made


def begin(folder, *names, continues=False):
    """The trackers of a run."""
    folder.mkdir(exist_ok=True)
    return Trackers(folder, RunConfig(output=OutputConfig(trackers=list(names))), continues)


def test_every_tracker_gets_settings_numbers_and_answers_in_a_thread_of_its_own(tmp_path, recording):
    run = begin(tmp_path / "run", "clearml", "trackio")
    run.log(1, {"loss": 2.0})
    run.tell(1, [SAMPLE])
    run.log(2, {"loss": 1.0})
    run.close({"steps": 2})
    clearml, trackio = recording
    assert clearml.given["adapter.rank"] == RunConfig().adapter.rank
    assert clearml.given["train.steps"] == "null"
    assert clearml.given["adapter.targets"]
    assert all(type(value) in (bool, int, float, str) for value in clearml.given.values())
    table = (1, "samples", ["step", "prompt", "expected", "answer"], [[1, "What?", "So.", "Well |\n<b>"]])
    assert clearml.logged == [(1, {"loss": 2.0}), table, (2, {"loss": 1.0})]
    assert trackio.logged == [(1, {"loss": 2.0}), (2, {"loss": 1.0})], "it has no place for texts"
    assert clearml.finished and trackio.finished
    assert len({clearml.thread, trackio.thread, threading.main_thread()}) == 3


def test_a_run_that_goes_on_is_known_to_its_trackers(tmp_path, recording):
    begin(tmp_path / "run", "clearml").close(None)
    begin(tmp_path / "run", "clearml", "trackio", continues=True).close(None)
    first, second, added = recording
    assert first.arguments["continue_last_task"] is False
    assert second.arguments["continue_last_task"] == "given-by-the-tracker"
    assert second.given is None, "it has the settings already"
    assert added.given is not None, "it has not seen the run before"
    begin(tmp_path / "run", "clearml").close(None)
    assert recording[-1].arguments["continue_last_task"] is False, "another run in the folder is a new one"


def test_one_that_fails_is_told_of_once_and_the_others_go_on(tmp_path, recording, monkeypatch, capfd):
    def fail(self, values, step):
        raise OSError("the network is gone")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "clearml", type("Failing", (Recording,), {"log": fail}))
    run = begin(tmp_path / "run", "clearml", "trackio")
    for step in range(1, 6):
        run.log(step, {"loss": 1.0})
    run.close(None)
    failing, other = recording
    assert [step for step, _ in other.logged] == [1, 2, 3, 4, 5]
    assert not failing.finished
    told = capfd.readouterr().err
    assert told.count("clearml gets nothing more of this run, which goes on: OSError: the network is gone") == 1


def test_one_that_hangs_holds_nobody_up(tmp_path, recording, monkeypatch, capfd):
    answer = threading.Event()
    monkeypatch.setitem(
        tracking.LOGGER_TYPE_TO_CLASS, "clearml",
        type("Hanging", (Recording,), {"log": lambda self, values, step: answer.wait()}),
    )  # fmt: skip
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "SECONDS_WHEN_STOPPED", 0.05)
    run = begin(tmp_path / "run", "clearml")
    for step in range(1, 20):
        run.log(step, {"loss": 1.0})
    run.close(None)
    answer.set()
    assert capfd.readouterr().err.count("clearml gets nothing more") == 1


@pytest.mark.parametrize(
    ("start", "said"),
    [(lambda self: 1 / 0, "division by zero"), (lambda self: exit("no key"), "it ends: no key"),
     (lambda self: time.sleep(5), "no answer within 0 s")],
)  # fmt: skip
def test_one_that_does_not_begin_is_refused_by_name(tmp_path, recording, monkeypatch, start, said):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "clearml", type("Refusing", (Recording,), {"start": start}))
    monkeypatch.setattr(trackers, "SECONDS_TO_BEGIN", 0.3)
    with pytest.raises(ValueError, match=f"output.trackers: clearml cannot begin: {said}"):
        begin(tmp_path / "run", "clearml")


def test_what_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(tracker_kinds.importlib.util, "find_spec", lambda name: name if name == "wandb" else None)
    check_installed(["wandb"])
    with pytest.raises(ValueError) as refused:
        check_installed(["wandb", "mlflow", "comet_ml"])
    assert str(refused.value) == "output.trackers: not installed here: mlflow, comet_ml; pip install mlflow comet_ml"


def test_no_tracker_is_begun_that_is_not_asked_for(tmp_path, recording):
    run = begin(tmp_path / "run")
    run.log(1, {"loss": 1.0})
    run.close(None)
    assert recording == []
    assert list((tmp_path / "run").iterdir()) == []


def test_a_damaged_list_of_ids_is_named(tmp_path, recording):
    (tmp_path / "trackers.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"trackers.json is damaged"):
        begin(tmp_path, "clearml", continues=True)


@pytest.mark.parametrize(
    ("settings", "mode", "asked"),
    [
        ({}, "off", []),
        ({"wandb": "offline"}, "offline", ["wandb"]),
        ({"trackers": ["wandb"]}, "online", ["wandb"]),
        ({"trackers": ["mlflow", "wandb"], "wandb": "offline"}, "offline", ["mlflow", "wandb"]),
        ({"trackers": ["mlflow"], "wandb": "online"}, "online", ["wandb", "mlflow"]),
    ],
)
def test_both_settings_may_ask_for_wandb(settings, mode, asked):
    output = OutputConfig(**settings)
    assert output.wandb_mode == mode
    assert output.all_trackers == asked


def test_accelerate_has_every_tracker_under_our_name():
    assert set(KINDS) == set(tracking.LOGGER_TYPE_TO_CLASS)


def test_a_cell_in_markdown_is_text_and_nothing_else():
    line = markdown([(1, "a | b", "<script>", "x\n![](http://y)")]).splitlines()[-1]
    assert line.count("|") == 5, "the borders of four cells"
    assert not set("<>![]()`*") & set(line.replace("<br>", ""))


def read_events(folder):
    """(tag, step) of everything in TensorBoard's files, and the texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    scalars = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = [events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]]
    return scalars, texts


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboard")
    for continues, step in ((False, 1), (True, 2)):
        run = begin(tmp_path / "run", "tensorboard", continues=continues)
        run.log(step, {"loss": 1.0 / step})
        run.tell(step, [SAMPLE])
        run.close(None)
    scalars, texts = read_events(tmp_path / "run" / "tensorboard")
    assert scalars == {"loss": [(1, 1.0), (2, 0.5)]}
    assert any("What?" in text and "<b>" not in text for text in texts)


def test_mlflow_for_real(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for continues, step in ((False, 1), (True, 2)):
        run = begin(tmp_path / "run", "mlflow", continues=continues)
        run.log(step, {"loss": 1.0 / step})
        run.tell(step, [SAMPLE])
        run.close(None)
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    client = mlflow.MlflowClient()
    assert [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "loss")] == [
        (1, 1.0),
        (2, 0.5),
    ]
    assert found.data.params["adapter.rank"] == str(RunConfig().adapter.rank)
    assert len(client.list_artifacts(found.info.run_id, "samples")) == 2
