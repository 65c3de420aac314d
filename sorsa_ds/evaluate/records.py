"""The samples of an evaluation on disk: written one by one by every rank, so that an interruption loses none.

settings.json             what is evaluated; the folder is refused to any other evaluation
samples-RANK.jsonl        what a rank has done so far, one line per sample
samples.jsonl             all samples in the order of the data, written at the end
results.json              the figures, written at the end

A line that was cut in half when a process was killed is left out, and its sample is made again. An evaluation may go on
with another number of ranks.
"""

import json
from pathlib import Path

import torch

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.files import write_json, write_text
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.runtime.json_text import finite_json, parse_json, read_json

SETTINGS, SAMPLES, RESULTS = "settings.json", "samples.jsonl", "results.json"
_PARTS = "samples-*.jsonl"


class Records:
    """The folder of one evaluation. Making one is a collective call, and so is each method except `write`.

    Args:
        settings: what is evaluated, in the words of the command line.
        identity: everything that the samples depend on.

    Raises:
        ValueError: the folder holds another evaluation or anything else, is in use, or cannot be written.
    """

    def __init__(self, folder: Path, settings: dict, identity: dict, device: torch.device):
        self.folder, self._device = folder, device
        self._lock = RunLock(folder)
        collectives.together(lambda: self._open(settings, identity), device, on=0)
        self._samples: dict[str, dict] = {record["id"]: record for record in read_samples(folder)}
        collectives.together(self._open_part, device)

    @property
    def done(self) -> dict[str, dict]:
        """The samples that were there when the folder was opened, by id."""
        return self._samples

    def write(self, record: dict) -> None:
        """Add a sample, which is in the file when this returns."""
        self._part.write(finite_json(record, ensure_ascii=False) + "\n")
        self._part.flush()

    def collect(self, order: list[str]) -> list[dict]:
        """The samples of all ranks in this order, which are also put into one file."""
        self._part.close()
        collectives.together(lambda: self._merge(order), self._device, on=0)
        return read_samples(self.folder)

    def finish(self, results: dict) -> None:
        """Write the results and release the folder's lock."""
        collectives.together(lambda: write_json(self.folder / RESULTS, results), self._device, on=0)
        self._lock.release()

    def _open(self, settings: dict, identity: dict) -> None:
        if not (self.folder / SETTINGS).exists():
            if self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise ValueError(f"--output: {self.folder} holds something that is no evaluation; name another folder")
            write_json(self.folder / SETTINGS, {**settings, "identity": identity})
        self._lock.acquire()
        before = read_json(self.folder / SETTINGS)
        differ = [name for name, value in identity.items() if before["identity"].get(name) != value]
        if differ:
            was = ", ".join(f"{name} {before[name]}" for name in settings)
            raise ValueError(
                f"--output: {self.folder} holds another evaluation ({was}; differing in {', '.join(differ)}); name "
                f"another folder, or remove it"
            )
        self._merge(None)

    def _open_part(self) -> None:
        self._part = (self.folder / f"samples-{collectives.rank()}.jsonl").open("a", encoding="utf-8")

    def _merge(self, order: list[str] | None) -> None:
        """Put all samples into one file, sorted where the order is known."""
        by_id = {record["id"]: record for record in read_samples(self.folder)}
        assert order is None or by_id.keys() == set(order), "samples are missing"
        records = by_id.values() if order is None else (by_id[id_] for id_ in order)
        write_text(self.folder / SAMPLES, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        for part in self.folder.glob(_PARTS):
            part.unlink()


def read_samples(folder: Path) -> list[dict]:
    """Every whole line of the samples' files; a sample may be in two of them where a process was killed."""
    records = []
    for file in [folder / SAMPLES, *sorted(folder.glob(_PARTS))]:
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        records += [parse_json(line) for line in text.split("\n")[:-1]]
    return records
