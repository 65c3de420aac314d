"""A seeded fuzzer: files that people write or download, changed at random, for the program's own readers.

    python tests/fuzz/run.py --mutations 300
    python tests/fuzz/run.py --mutations 20 --kind CSV --seed 7 --show

Settings in YAML, DeepSpeed's JSON, rows of data, and the descriptions of adapters and checkpoints. A changed file must
be accepted or refused in words: no other error, no call that takes longer than its limit, and nothing accepted that
makes no sense by the tables in `tests/fuzz/tables.py`, which ask the program nothing. The same seed makes the same
files. Nothing is asked of the network. The last line is JSON: tried, tracebacks, hangs, accepted_nonsense; the exit
code is 1 where one of the last three is not 0.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
SECONDS = 60.0
"""The time limit of a case, which takes a tenth of a second on an idle machine."""
LONGEST_MESSAGE = 3000
FAULTS = ("traceback", "hang", "nonsense")


def kinds() -> dict:
    """Name of a kind -> the kind."""
    from tests.fuzz import of_descriptions, of_rows, of_settings

    return {kind.name: kind for module in (of_settings, of_rows, of_descriptions) for kind in module.KINDS}


def cases(kind, mutations: int, seed: int) -> list:
    """Unchanged files, which have negative numbers, and so many changed ones."""
    from tests.fuzz.kinds import Case

    whole = [Case(kind.name, -1 - n, *one) for n, one in enumerate(kind.whole)]
    changed = [Case(kind.name, n, *kind.make(Random(f"{seed}/{kind.name}/{n}"))) for n in range(mutations)]
    return whole + changed


def examine(case) -> tuple[str, str]:
    """Give one file to its readers; returns what came of it, and words for a fault."""
    from tests.fuzz.rules import Nonsense

    kind = kinds()[case.kind]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / kind.file).write_bytes(case.content)
        try:
            facts = kind.read(Path(folder), case.extra)
        except ValueError as error:
            return _refusal(error, kind.file)
        except BaseException:
            return "traceback", traceback.format_exc()
    try:
        kind.judge(case.content, case.extra, facts)
    except Nonsense as reason:
        return "nonsense", str(reason)
    return "accepted", ""


def _refusal(error: ValueError, file: str) -> tuple[str, str]:
    """A refusal in words that name the file, or what is wrong with its words."""
    told = str(error)
    if type(error) is not ValueError:
        return "traceback", f"a {type(error).__name__} that nobody has put into words: {told[:500]}"
    if not told.strip() or len(told) > LONGEST_MESSAGE:
        return "traceback", f"a message of {len(told)} characters: {told[:500]}"
    from tests.fuzz.tables import SETTINGS

    places = (file, "DeepSpeed JSON", "training data", "--resume", "--model", ".safetensors", *SETTINGS)
    if not any(place in told for place in places):
        return "traceback", f"a message that names nothing: {told}"
    return "refused", told


def prepare() -> None:
    """Keep libraries off the network and out of the user's folders, and import them once for all workers."""
    os.environ.update(OFFLINE)
    os.environ["HF_HOME"] = os.environ["SORSA_CACHE"] = tempfile.mkdtemp(prefix="fuzz-")
    import deepspeed
    import peft  # noqa: F401
    import torch

    import sorsa_ds.data.examples
    import sorsa_ds.evaluate.models
    import sorsa_ds.plan.job
    import sorsa_ds.train.origin  # noqa: F401
    from tests.fuzz.of_rows import tokenizer

    deepspeed.utils.logger.disabled = True
    torch.set_num_threads(1)
    tokenizer()


def fuzz(mutations: int, seed: int = 0, only: str = "", show: bool = False) -> dict[str, int]:
    """Try so many changed files of each kind, tell each fault, and count."""
    from tests.fuzz.workers import HANG, answers

    prepare()
    counts: dict[str, Counter] = {}
    chosen = [kind for name, kind in kinds().items() if only.lower() in name.lower()]
    every = [case for kind in chosen for case in cases(kind, mutations, seed)]
    for case, answer in answers(examine, every, SECONDS, min(2, os.cpu_count() or 1)):
        if isinstance(answer, str):
            answer = ("hang", f"more than {SECONDS:g} s") if answer == HANG else ("traceback", answer)
        verdict, told = answer
        if case.number < 0 and verdict == "refused":
            verdict = "traceback"  # an unchanged file
        counts.setdefault(case.kind, Counter())[verdict] += 1
        if verdict in FAULTS or show:
            print(f"{verdict}: {case.kind} number {case.number}, seed {seed}: {told}\n  {case.content[:300]!r}")
    for name, found in counts.items():
        print(f"{name}: " + ", ".join(f"{number} {verdict}" for verdict, number in sorted(found.items())))
    totals = sum(counts.values(), Counter())
    return {
        "tried": totals.total(),
        "tracebacks": totals["traceback"],
        "hangs": totals["hang"],
        "accepted_nonsense": totals["nonsense"],
    }


def main() -> None:
    """Fuzz, and print the counts as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=300, help="changed files of each kind (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.add_argument("--kind", default="", help="only kinds with this in their name")
    parser.add_argument("--show", action="store_true", help="tell every case, not only the faults")
    options = parser.parse_args()
    found = fuzz(options.mutations, options.seed, options.kind, options.show)
    print(json.dumps(found))
    raise SystemExit(any(found[key] for key in ("tracebacks", "hangs", "accepted_nonsense")))


if __name__ == "__main__":
    main()
