"""Many rows are tokenised by several processes, which give what one gives, and end with the one that they work for."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from datasets import Dataset

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import workers
from sorsa_ds.data.tokenize import Encoder
from sorsa_ds.data.workers import encode_in_parts
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.projects import ROOT
from tests.helpers.small_data import write_lines

pytestmark = pytest.mark.slow


def conversation(number: int) -> dict:
    """A row that a template has to render."""
    said = [("user", f"What is {number}?"), ("assistant", f"It is {number}." * (number % 5))]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def parts_of(rows: list[dict], fewest: int, monkeypatch, data: DataConfig | None = None):
    """The parts that rows are tokenised in; `fewest`: from how many rows on by several processes."""
    monkeypatch.setattr(workers, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(workers, "ROWS_PER_CALL", 50)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    data, table = data or DataConfig(), Dataset.from_list(rows)
    encoder = Encoder.of(data, table.column_names, chat_tokenizer(), "rows")
    return encode_in_parts(table, data, encoder, lambda number: f"FILE, row {number + 1}")


def test_workers_give_what_one_process_gives_and_refuse_what_it_refuses(monkeypatch):
    rows = [conversation(number) for number in range(330)]
    alone, shared = ([*parts_of(rows, fewest, monkeypatch)] for fewest in (1000, 100))
    assert [len(part.examples) for part in shared] == [40] * 6 + [24]
    for one, other in zip(alone, shared, strict=True):
        assert one.counts == other.counts
        assert [e["labels"].tolist() for e in one.examples] == [e["labels"].tolist() for e in other.examples]
    assert sum(part.left_out.total() for part in shared) == 66
    rows[217]["messages"][0]["role"] = "assistant"
    with pytest.raises(ValueError, match=r"^rows, row 218 \(FILE, row 218\): "):
        list(parts_of(rows, 100, monkeypatch))
    with pytest.raises(ValueError, match=r"^rows, row 2 \(FILE, row 2\): it has \d+ tokens, more than .*max_length"):
        list(parts_of(rows, 100, monkeypatch, DataConfig(max_length=8, truncation="error")))


def test_only_columns_that_are_looked_at_are_decoded_and_sent(monkeypatch):
    seen = []
    whole = workers.encode_rows
    monkeypatch.setattr(workers, "encode_rows", lambda rows, *rest: seen.extend(map(set, rows)) or whole(rows, *rest))
    rows = [{"question": "1?", "answer": "1", "tools": None, "notes": ["x"] * 9} for _ in range(60)]
    list(parts_of(rows, 1000, monkeypatch))
    assert seen == [{"question", "answer", "tools"}] * 60
    seen.clear()
    list(
        parts_of(
            rows, 1000, monkeypatch, DataConfig(prompt="{{ question }}{{ notes[0] }}", columns={"response": "answer"})
        )
    )
    assert seen == [{"question", "answer", "notes"}] * 60
    assert [len(part.examples) for part in parts_of(rows * 3, 100, monkeypatch)] == [50, 50, 50, 30]


def fork_servers() -> list[psutil.Process]:
    """This process's servers that fork workers. What other tests have left as zombies is none."""
    children = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    return [child for child in children if "forkserver" in " ".join(child.cmdline())]


def test_the_server_that_forks_workers_ends_with_them(monkeypatch):
    before = fork_servers()  # other tests may have left some
    list(parts_of([conversation(number) for number in range(330)], 100, monkeypatch))
    assert not {*fork_servers()} - {*before}


def test_a_worker_that_the_system_ends_stops_the_run_with_a_word(monkeypatch):
    before = fork_servers()
    parts = parts_of([conversation(number) for number in range(2000)], 100, monkeypatch)
    next(parts)
    killed = [process for server in fork_servers() if server not in before for process in server.children()]
    assert len(killed) == 2
    for process in killed:
        process.kill()
    with pytest.raises(ValueError, match=r"^rows: a process that tokenises rows was ended, most likely for want of m"):
        list(parts)


PROGRAM = """
import sys
from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data import workers
from sorsa_ds.data.examples import load_examples
from tests.helpers.chat_tokenizer import chat_tokenizer

if __name__ == "__main__":
    workers.FEWEST_ROWS = 100
    workers.ROWS_PER_CALL = 50
    workers.os.sched_getaffinity = lambda process: {0, 1}
    load_examples(DataConfig(path=sys.argv[1]), chat_tokenizer(), 0)
"""


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_script_without_a_guard_is_not_run_again_by_its_workers(tmp_path, way):
    file = write_lines(tmp_path / "rows.jsonl", [conversation(number) for number in range(330)])
    program = PROGRAM.replace('if __name__ == "__main__":', 'if print("program begins", flush=True) is None:')
    (tmp_path / "program.py").write_text(f"{program}    print('program ends')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SORSA_CACHE": str(tmp_path / "cache")}
    given = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    if way == "file":
        ran = subprocess.run([sys.executable, tmp_path / "program.py", file], **given)
    else:
        ran = subprocess.run([sys.executable, "-", file], input=(tmp_path / "program.py").read_text(), **given)
    assert ran.returncode == 0, ran.stdout
    assert (ran.stdout.count("program begins"), ran.stdout.count("program ends")) == (1, 1)


def test_workers_end_with_the_process_that_they_work_for_and_nothing_is_kept(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [conversation(number) for number in range(20_000)])
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SORSA_CACHE": str(tmp_path / "cache")}
    program = subprocess.Popen([sys.executable, tmp_path / "program.py", file], env=environment, cwd=ROOT)
    watched = psutil.Process(program.pid)
    until = time.monotonic() + 200
    while len(family := watched.children(recursive=True)) < 6 and time.monotonic() < until:  # two workers, two children
        time.sleep(0.1)
    assert len(family) >= 6, family
    program.send_signal(signal.SIGKILL)
    program.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir() and path.name[0] != "."]
