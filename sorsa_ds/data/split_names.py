"""Which split of a folder each of its files belongs to, by the names of files and folders alone."""

import re
from collections.abc import Sequence
from pathlib import Path

SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""The words by which a name says a split."""

_SHARD = re.compile(r"(?:[-_.]?\d+(?:-of-\d+)?)?$")


def splits_of(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split: `train` alone, unless the folder is laid out as splits.

    It is, where every file is named by its split (train.jsonl, test-00000-of-00002.parquet), lies in a folder that
    is (test/a.jsonl), or has a counterpart that differs in the split alone (mine_train.jsonl, mine_test.jsonl).

    Raises:
        ValueError: some files are laid out as held-out splits and others are not, so that these may be meant to be
            learned or not; or several folders are laid out as splits, each by itself.
    """
    stems = {file: _stem(file) for file in files}
    named = {file: split for file in files if (split := _exact(file.relative_to(root), stems[file]))}
    named |= _counterparts([file for file in files if file not in named], stems)
    others = [file for file in files if file not in named]
    if others:
        if held_out := [file for file, split in named.items() if split != "train"]:
            raise ValueError(
                f"{root}: {held_out[0].relative_to(root)} is named as a split that is held out, and "
                f"{others[0].relative_to(root)} as none: name one file, or put each into a folder of its split"
            )
        return {"train": list(files)}
    _check_one_set(root, named)
    splits: dict[str, list[Path]] = {}
    for split in ("train", "validation", "test"):
        for file in files:
            if named[file] == split:
                splits.setdefault(split, []).append(file)
    return _with_dev(splits, root, stems)


def _with_dev(splits: dict[str, list[Path]], root: Path, stems: dict[Path, str]) -> dict[str, list[Path]]:
    """The splits with `dev` as one of its own where there is another validation split beside it, as MMLU has."""
    validation = splits.get("validation", [])
    dev = [file for file in validation if _words(file.relative_to(root), stems[file])[0] == "dev"]
    if not dev or len(dev) == len(validation):
        return splits
    return {**splits, "validation": [file for file in validation if file not in dev], "dev": dev}


def _stem(file: Path) -> str:
    """The name of a file without suffix and without the number of its part, in lower case."""
    return _SHARD.sub("", re.sub(r"(\.jsonl?|\.csv|\.parquet)(\.gz)?$", "", file.name.lower()))


def _words(place: Path, stem: str) -> list[str]:
    """The words by which a file or the folders around it are named, if these are splits; the innermost first."""
    return _whole(place, stem) or [word for word in re.split(r"[-_. ]", stem) if word in SPLITS] or [""]


def _whole(place: Path, stem: str) -> list[str]:
    """The names of a file and of the folders around it that are a split's and nothing else; the innermost first."""
    return [word for word in [stem, *(part.lower() for part in reversed(place.parts[:-1]))] if word in SPLITS]


def _exact(place: Path, stem: str) -> str | None:
    found = _whole(place, stem)
    return SPLITS[found[0]] if found else None


def _counterparts(files: list[Path], stems: dict[Path, str]) -> dict[Path, str]:
    """The splits of files whose names differ in the word for the split alone, one of which is for training."""
    sets: dict[tuple[Path, str], dict[Path, str]] = {}
    for file in files:
        for word in re.finditer(r"[^-_. ]+", stems[file]):
            if split := SPLITS.get(word[0]):
                rest = f"{stems[file][: word.start()]}*{stems[file][word.end() :]}"
                sets.setdefault((file.parent, rest), {})[file] = split
    return {
        file: split
        for found in sets.values()
        if "train" in found.values() and len(set(found.values())) > 1
        for file, split in found.items()
    }


def _check_one_set(root: Path, named: dict[Path, str]) -> None:
    """Stop where two folders have several splits each, which are then data sets of their own."""
    of_folder: dict[str, set[str]] = {}
    for file, split in named.items():
        above = [part for part in file.relative_to(root).parts[:-1] if part.lower() not in SPLITS]
        of_folder.setdefault("/".join(above), set()).add(split)
    several = sorted(folder for folder, splits in of_folder.items() if folder and len(splits) > 1)
    if len(several) > 1:
        raise ValueError(
            f"{root} holds several data sets, each with its splits: {', '.join(several)}; say which one with data.name"
        )
