"""The parts of a comparison in the papers' set-up: each one is a call of launch/compare.py that goes on by itself.

OUTPUT/paper_7b.yaml     the settings of all runs
OUTPUT/parts/NAME.json   what a part was made with, whether it is finished, and what it found
OUTPUT/...               the comparison's own files, as docs/comparison.md describes them
"""

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.helpers.common import ROOT, launch_environment
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.errors import Preempted
from sorsa_ds.runtime.files import write_json, write_text
from sorsa_ds.runtime.json_text import read_json
from sorsa_ds.runtime.leave import receiving
from sorsa_ds.study.compare.request import Request

TRAIN = "train"
SETTINGS = "paper_7b.yaml"
FOUND = "comparison.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One part: the training of a method, or a task that all methods and the base model are measured in.

    task: the name of a task of launch/evaluate.py; None: the part trains.
    options: further options of launch/evaluate.py.
    """

    name: str
    methods: tuple[str, ...]
    task: str | None = None
    options: str = ""


def parts_of(kinds: Sequence[str], methods: Sequence[str], options: dict[str, str]) -> list[Part]:
    """The parts of these kinds, `train` or a task, in this order.

    Args:
        options: task -> options of launch/evaluate.py.
    """
    found: list[Part] = []
    for kind in kinds:
        if kind == TRAIN:
            found += [Part(f"{TRAIN}-{method}", (method,)) for method in methods]
        else:
            found.append(Part(kind, tuple(methods), kind, options[kind]))
    return found


@dataclass(slots=True)
class Work:
    """Makes the parts of a comparison, one after the other.

    failed: part -> why it is not finished. told_to_stop: name of the signal that this process has received, if any.
    """

    request: Request
    failed: dict[str, str] = field(default_factory=dict, init=False)
    told_to_stop: str | None = field(default=None, init=False)
    _process: subprocess.Popen | None = field(default=None, init=False)

    def record(self, name: str) -> dict | None:
        """What is known of a part that was made before."""
        file = self._file(name)
        return read_json(file) if file.exists() else None

    def is_finished(self, part: Part) -> bool:
        """Whether a part came to its end with the settings of this command."""
        found = self.record(part.name)
        return found is not None and found["finished"] and self._is_of_this_command(part)

    def make(self, part: Part) -> None:
        """Make a part, or go on with it, unless it is finished. One that fails is noted in `failed`.

        Raises:
            Preempted: this process was told to stop, and the part has ended in good order.
        """
        if self.is_finished(part):
            return
        ready = [m for m in part.methods if part.task is None or self._is_trained(m)]
        missing = [m for m in part.methods if m not in ready]
        lacks = f"{', '.join(missing)}: not trained, so not measured; see the training's own message" if missing else ""
        if not ready:
            self.failed[part.name] = lacks
            return
        file = self.request.output / FOUND
        before = file.stat().st_mtime_ns if file.exists() else None
        write_text(self.request.output / SETTINGS, to_yaml(self.request.base))
        code = self._launch(self._words(part, ready), part.name)
        fresh = file.exists() and file.stat().st_mtime_ns != before
        found = read_json(file) if fresh else None
        if code:
            reasons = [f"{one['method']}: {one['reason']}" for one in (found or {"failed": []})["failed"]]
            lacks = "; ".join([*reasons, lacks] if lacks else reasons) or f"exit code {code}: its message stands above"
        if lacks:
            self.failed[part.name] = lacks
        if found is not None:
            self._note(part, found, finished=not lacks)

    def measured(self, task: str, parts: Sequence[Part]) -> dict | None:
        """What is known of a task. Where it is one of this command's parts, what other settings gave does not count."""
        part = next((part for part in parts if part.task == task), None)
        return None if part is not None and not self._is_of_this_command(part) else self.record(task)

    def scores(self, task: str, parts: Sequence[Part]) -> dict[str, dict]:
        """Model -> its score in a task, with `mean`, `deviation` and `count` over seeds; `base` is the base model."""
        found = self.measured(task, parts) or {}
        return {name: score for name, score in found.get("scores", {}).items() if score is not None}

    def trained_parameters(self, method: str) -> int | None:
        """How many parameters a method has trained; None where it has not yet."""
        found = self.record(f"{TRAIN}-{method}") or {}
        return found.get("trained_parameters", {}).get(method)

    def _file(self, name: str) -> Path:
        return self.request.output / "parts" / f"{name}.json"

    def _is_trained(self, method: str) -> bool:
        return self.is_finished(Part(f"{TRAIN}-{method}", (method,)))

    def _is_of_this_command(self, part: Part) -> bool:
        found = self.record(part.name)
        return found is not None and found["made_with"] == self._made_with(part)

    def _made_with(self, part: Part) -> str:
        """A digest of all that a part's results depend on."""
        words = self._words(part, part.methods)
        shared = to_yaml(self.request.base).encode() + self.request.ds_config.read_bytes()
        return digest.of_bytes(shared + repr(words[words.index("--methods") :]).encode())

    def _words(self, part: Part, methods: Sequence[str]) -> list[str]:
        """The options of launch/compare.py; those behind --methods decide what is found."""
        request = self.request
        rates = [f"{method}={rate}" for method in methods for rate in request.rates[method]]
        return [
            "--config", str(request.output / SETTINGS), "--ds_config", str(request.ds_config),
            "--output", str(request.output), *(["--num_gpus", str(request.num_gpus)] if request.num_gpus else []),
            "--methods", ",".join(methods), "--learning_rates", ",".join(rates),
            "--seeds", ",".join(map(str, request.seeds)), "--rate_seeds", "all" if request.every_seed else "first",
            *(["--task", part.task, f"--task_options={part.options}"] if part.task else []),
        ]  # fmt: skip

    def _note(self, part: Part, found: dict, finished: bool) -> None:
        """Write down what a part has found."""
        methods, scores = found["methods"], {}
        if part.task is not None:
            scores = {"base": {"mean": found["score_before"], "deviation": None, "count": 1}}
            scores |= {one["method"]: one["score"] for one in methods}
        trained = {one["method"]: one["figures"]["trainable_parameters"]["mean"] for one in methods}
        write_json(
            self._file(part.name),
            {
                "finished": finished,
                "made_with": self._made_with(part),
                "options": part.options,
                "scores": scores,
                "trained_parameters": trained,
                "failed": found["failed"],
            },
        )

    def _launch(self, words: Sequence[str], name: str) -> int:
        """Run launch/compare.py in a session of its own; returns its exit code. It writes to this process's streams.

        Raises:
            Preempted: this process was told to stop, and the command has ended.
        """
        if self.told_to_stop is None:
            command = [sys.executable, str(ROOT / "launch" / "compare.py"), *words]
            self._process = subprocess.Popen(command, env=launch_environment(), start_new_session=True)
            if self.told_to_stop is not None:  # before this process knew its child
                self._process.terminate()
            self._process.wait()
        if self.told_to_stop is not None:
            raise Preempted(f"{self.told_to_stop}: stopped in the part {name}; the same command goes on")
        assert self._process is not None, "it was started above"
        return self._process.returncode

    def stopping(self) -> contextlib.AbstractContextManager[None]:
        """Context in which a Ctrl-C or a SIGTERM is passed on to the part at work, which saves what it is at.

        Outside of it they end this process at once.
        """
        return receiving(self._stop)

    def _stop(self, signal_name: str) -> None:
        self.told_to_stop = signal_name
        if self._process is not None:
            self._process.terminate()
