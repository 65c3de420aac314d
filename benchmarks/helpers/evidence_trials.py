"""The runs of the study of what SORSA is good for: parts, variants of methods, their rates, and which run is due next.

A part fixes model, data, steps and rank. Every variant of a part begins with three learning rates and the first seed;
while the best of them is the lowest or the highest, a rate beyond it is added, so that every best rate has neighbours
on both sides. Then the other seeds follow, at the best rate, the next one and the two below (one for the larger model),
where losses are higher: drift at equal loss is read there. The best rate of a variant is the one with the lowest mean
over the seeds, among those that have them all; where it is at their end, the next one beyond it follows with all seeds.

The variants of `MAIN` are finished before the others begin. Of the others, those whose loss with the first seed is
within `CLOSE` of LoRA's lowest are run with the other seeds too, at their best rate alone.

A part that is `settled` looks for no rate: it holds what another part has found against problems that had no share in
finding it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean

PLAIN_PROMPT = "data.prompt='{{ question }} '"
SHORT = ("data.format=gsm8k", PLAIN_PROMPT, "data.truncation=drop")


@dataclass(frozen=True, slots=True)
class Part:
    """What all runs of a part share.

    model: `small` or `default`.
    seeds: the number of seeds.
    settings: the runs' settings; `{gsm8k}` and `{words}` stand for folders with train.jsonl and test.jsonl, and in a
        variant's settings `{directions}` for the file of input directions of the part's model.
    rates: variant -> the learning rates with which it begins.
    samples: (number, tokens) of the base model's samples on which drift is measured.
    spectra_every: full decompositions are made of every so many-th linear.
    questions: the number of choices that are made.
    below: at how many rates below the best the other seeds run too.
    settled: whether all seeds run at the rates with which a variant begins, and at no other.
    own_lines: if not 0, each seed learns so many lines of the training file, which no other seed learns, and none of
        the first so many.
    first_seed: `train.seed` of the part's seed 0.
    """

    name: str
    model: str
    rank: int
    seeds: int
    variants: tuple[str, ...]
    settings: tuple[str, ...]
    rates: dict[str, tuple[float, ...]]
    samples: tuple[int, int]
    spectra_every: int = 1
    questions: int = 60
    below: int = 2
    settled: bool = False
    own_lines: int = 0
    first_seed: int = 0

    def trials(self, variant: str, rate: float) -> "list[Trial]":
        """A variant's runs at a learning rate, one for each seed in their order."""
        return [Trial(self.name, variant, rate, seed) for seed in range(self.seeds)]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: a variant of a method at a learning rate with a seed, within a part."""

    part: str
    variant: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """A name for folders and logs."""
        return f"{self.part}-{self.variant}-{self.learning_rate:g}-{self.seed}"

    def settings(self) -> list[str]:
        """What the variant, its rate, its seed and the seed's own lines are on the command line."""
        part = PARTS[self.part]
        first = part.own_lines * (self.seed + 1)
        own = [f"data.train_split=train[{first}:{first + part.own_lines}]"] if part.own_lines else []
        seed = f"train.seed={part.first_seed + self.seed}"
        return [*VARIANTS[self.variant], f"train.learning_rate={self.learning_rate}", seed, *own]


VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": ("method=lora",),
    "lora-plus": ("method=lora", "baseline.loraplus_lr_ratio=16"),
    "pissa": ("method=pissa",),
    "dora": ("method=dora",),
    "partial": ("method=partial",),
    "full": ("method=full",),
    "sorsa": (),
    "sorsa-no-reg": ("regularizer.gamma=0",),
    "sorsa-strong": ("regularizer.gamma=2.0*lr",),
    "sorsa-rigid": ("regularizer.gamma=20.0*lr",),
    "sorsa-sqrt": ("sorsa.column_rates=inverse_sqrt",),
    "sorsa-inverse": ("sorsa.column_rates=inverse",),
    "sorsa-log": ("sorsa.s_space=log",),
    "sorsa-fast-s": ("sorsa.s_lr_ratio=30",),
    "middle": ("sorsa.triplets=window",),
    "null-space": ("sorsa.triplets=null_space", "sorsa.directions={directions}"),
    "null-space-no-reg": (
        "sorsa.triplets=null_space",
        "sorsa.directions={directions}",
        "regularizer.gamma=0",
    ),
    "trailing": ("sorsa.triplets=trailing",),
    "trailing-no-reg": ("sorsa.triplets=trailing", "regularizer.gamma=0"),
    "trailing-strong": ("sorsa.triplets=trailing", "regularizer.gamma=2.0*lr"),
    "trailing-sqrt": ("sorsa.triplets=trailing", "sorsa.column_rates=inverse_sqrt"),
    "trailing-inverse": ("sorsa.triplets=trailing", "sorsa.column_rates=inverse"),
}
"""Variant -> its settings; the papers' SORSA is `sorsa`, with the default regulariser."""

_LORA = (1e-2, 1.4e-2, 2e-2)
_WHOLE = (1.4e-3, 2e-3, 2.8e-3)
_LEADING = (2.8e-3, 4e-3, 5.6e-3)
_TRAILING = (1.4e-2, 2e-2, 2.8e-2)
SMALL_RATES: dict[str, tuple[float, ...]] = {
    "lora": (7e-3, *_LORA),
    "lora-plus": (1.2e-3, 1.8e-3, 2.5e-3),
    "pissa": (4.2e-3, 6e-3, 8.5e-3),
    "dora": _LORA,
    "partial": _WHOLE,
    "full": _WHOLE,
    **dict.fromkeys(("sorsa", "sorsa-no-reg", "sorsa-strong", "sorsa-rigid", "sorsa-log", "sorsa-fast-s"), _LEADING),
    "sorsa-sqrt": (6e-3, 8.5e-3, 1.2e-2),
    "sorsa-inverse": (7e-3, 1e-2, 1.4e-2),
    **dict.fromkeys(("null-space", "null-space-no-reg"), (7e-3, 1e-2, 1.4e-2)),
    "middle": (8e-3, 1.1e-2, 1.6e-2),
    **dict.fromkeys(("trailing", "trailing-no-reg", "trailing-strong"), _TRAILING),
    "trailing-sqrt": (1e-2, 1.4e-2, 2e-2),
    "trailing-inverse": (6e-3, 8.5e-3, 1.2e-2),
}
"""Learning rates with which a variant begins on the small model."""

FEW_RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("lora", "dora"), (1.9e-3, 2.6e-3, 3.6e-3)),
    "pissa": (1.1e-3, 1.5e-3, 2.1e-3),
    "partial": (3.6e-4, 5e-4, 7.1e-4),
    "null-space": (2.6e-3, 3.6e-3, 5e-3),
    **dict.fromkeys(("sorsa", "sorsa-no-reg", "sorsa-strong", "sorsa-rigid"), (7.1e-4, 1e-3, 1.4e-3)),
    **dict.fromkeys(("trailing", "trailing-no-reg", "trailing-strong"), (3.6e-3, 5e-3, 7.1e-3)),
}
"""With few examples in many passes the best rates are lower; above them losses have a second, higher minimum."""

DEFAULT_RATES: dict[str, tuple[float, ...]] = {
    "lora": (9e-4, 1.8e-3, 3.6e-3),
    "pissa": (2e-4, 4e-4, 8e-4),
    "partial": (2e-5, 4e-5, 8e-5),
    "sorsa": (6.5e-5, 1.3e-4, 2.6e-4),
    "sorsa-sqrt": (2e-4, 4e-4, 8e-4),
    "null-space": (3e-4, 6e-4, 1.2e-3),
    "trailing": (3e-4, 6e-4, 1.2e-3),
    "trailing-no-reg": (3e-4, 6e-4, 1.2e-3),
    "trailing-sqrt": (2e-4, 4e-4, 8e-4),
}
"""Learning rates with which a variant begins on the default model at rank 16."""

PEER = "lora"
"""The method to which all are compared."""
MAIN = (PEER, "sorsa", "null-space", "trailing", "pissa", "partial", "trailing-no-reg")
CLOSE = 0.05
"""Nats per token: how much higher a variant's loss with the first seed may be than LoRA's lowest, to be run on."""
STEP = 1.4
"""The factor from a learning rate to the next that is tried."""
_OTHERS = tuple(variant for variant in VARIANTS if variant not in MAIN)
_BATCH = ("train.global_batch_size=8", "train.micro_batch_size=8", "data.max_length=256")
_GSM8K = ("data.path={gsm8k}/train.jsonl", "data.eval_path={gsm8k}/test.jsonl", "data.eval_size=1319", *SHORT)
_WORD_PROBLEMS = ("data.path={words}/train.jsonl", "data.eval_path={words}/test.jsonl", "data.eval_size=1024", *SHORT)

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            "small-gsm8k", "small", 8, 5, (*MAIN, *_OTHERS), (*_GSM8K, *_BATCH, "train.steps=160"), SMALL_RATES,
            (64, 192),
        ),
        Part(
            "small-gsm8k-fresh", "small", 8, 8,
            (PEER, "sorsa", "pissa", "null-space", "trailing", "trailing-no-reg"),
            (*_GSM8K, *_BATCH, "train.steps=160"),
            {PEER: (7e-3, 1e-2, 1.4e-2), "sorsa": (5.6e-3,), "pissa": (8.5e-3,), "null-space": (1e-2, 1.4e-2),
             "trailing": (2e-2, 2.8e-2), "trailing-no-reg": (2e-2,)},
            (64, 192), settled=True, first_seed=5,
        ),
        Part(
            "small-few", "small", 8, 5,
            (*MAIN, "sorsa-no-reg", "sorsa-strong", "sorsa-rigid", "trailing-strong", "dora"),
            (*_GSM8K, *_BATCH, "data.train_split=train[:296]", "train.epochs=15"), FEW_RATES, (64, 192),
        ),
        Part(
            "small-few-fresh", "small", 8, 8, (PEER, "sorsa", "sorsa-strong", "pissa", "trailing"),
            (*_GSM8K, *_BATCH, "train.epochs=15"),
            {PEER: (3.6e-3,), "sorsa": (1e-3,), "sorsa-strong": (1.4e-3,), "pissa": (1.5e-3,), "trailing": (5e-3,)},
            (64, 192), settled=True, own_lines=296,
        ),
        Part(
            "small-words", "small", 8, 5, MAIN, (*_WORD_PROBLEMS, *_BATCH, "train.steps=120"), SMALL_RATES, (64, 192)
        ),
        Part("small-rank4", "small", 4, 3, MAIN, (*_GSM8K, *_BATCH, "train.steps=160"), SMALL_RATES, (64, 192)),
        Part("small-rank32", "small", 32, 3, MAIN, (*_GSM8K, *_BATCH, "train.steps=160"), SMALL_RATES, (64, 192)),
        Part("small-long", "small", 8, 3, MAIN, (*_GSM8K, *_BATCH, "train.steps=480"), SMALL_RATES, (64, 192)),
        Part(
            "default-gsm8k", "default", 16, 3, tuple(DEFAULT_RATES),
            (*_GSM8K, "data.eval_size=96", "train.global_batch_size=4", "train.micro_batch_size=4",
             "data.max_length=256", "train.steps=32"),
            DEFAULT_RATES, (16, 96), spectra_every=23, questions=0, below=1,
        ),
    )
}  # fmt: skip


def due(part: Part, losses: dict[Trial, float]) -> list[Trial]:
    """The runs of a part that can be made now, in the order in which they are wanted; none where the part is finished.

    Args:
        losses: held-out losses of the runs that are made.
    """
    if part.settled:
        all_of_it = (
            Trial(part.name, variant, rate, seed)
            for seed in range(part.seeds) for variant in part.variants for rate in part.rates[variant]
        )  # fmt: skip
        return [trial for trial in all_of_it if trial not in losses]
    for variants in (MAIN, _OTHERS):
        here = [variant for variant in part.variants if variant in variants]
        first = [trial for variant in here for trial in _with_first_seed(part, variant, losses)]
        found = first or [trial for variant in here for trial in _with_other_seeds(part, variant, losses)]
        if found:
            return found
    return []


def _rates_with_first_seed(part: Part, variant: str, losses: dict[Trial, float]) -> list[float]:
    """The learning rates at which a variant has run with the first seed, in their order."""
    return sorted(t.learning_rate for t in losses if (t.part, t.variant, t.seed) == (part.name, variant, 0))


def _with_first_seed(part: Part, variant: str, losses: dict[Trial, float]) -> list[Trial]:
    """The rates with which the variant begins; then one beyond the best, as long as the best is at an end."""
    rates = _rates_with_first_seed(part, variant, losses)
    begun = [rate for rate in part.rates[variant] if rate not in rates]
    if not begun:
        best = _best(part, variant, losses)
        begun = {rates[0]: [_rounded(best / STEP)], rates[-1]: [_rounded(best * STEP)]}.get(best, [])
    return [Trial(part.name, variant, rate, 0) for rate in begun]


def _with_other_seeds(part: Part, variant: str, losses: dict[Trial, float]) -> list[Trial]:
    """The variant's best rate with the other seeds, and rates beside it, as far as the variant is followed."""
    best, rates = _best(part, variant, losses), _rates_with_first_seed(part, variant, losses)
    if variant in MAIN:
        at = rates.index(best)
        rates = rates[max(0, at - part.below) : at + 2]
    else:
        firsts = {t: loss for t, loss in losses.items() if (t.part, t.seed) == (part.name, 0)}
        lowest = min([loss for t, loss in firsts.items() if t.variant == PEER] or firsts.values())
        rates = [best] if losses[Trial(part.name, variant, best, 0)] <= lowest + CLOSE else []
    wanted = [Trial(part.name, variant, rate, seed) for seed in range(1, part.seeds) for rate in rates]
    left = [trial for trial in wanted if trial not in losses]
    return left if left or variant not in MAIN else _beyond_the_best(part, variant, losses)


def _beyond_the_best(part: Part, variant: str, losses: dict[Trial, float]) -> list[Trial]:
    """A rate beyond the best over all seeds, with all seeds, where the best has no such neighbour on one side."""
    tried = {t.learning_rate for t in losses if (t.part, t.variant) == (part.name, variant)}
    whole = _means_over_seeds(part, losses)[variant]
    best = best_rates(part, losses)[variant]
    found = []
    if best == max(whole):
        found.append(min((r for r in tried if r > best), default=_rounded(best * STEP)))
    if best == min(whole):
        found.append(max((r for r in tried if r < best), default=_rounded(best / STEP)))
    trials = [Trial(part.name, variant, rate, seed) for seed in range(part.seeds) for rate in found]
    return [trial for trial in trials if trial not in losses]


def _best(part: Part, variant: str, losses: dict[Trial, float]) -> float:
    """The rate with the lowest loss with the first seed."""
    rates = _rates_with_first_seed(part, variant, losses)
    return min(rates, key=lambda rate: losses[Trial(part.name, variant, rate, 0)])


def _rounded(rate: float) -> float:
    """A learning rate in two digits."""
    return float(f"{rate:.1e}")


def best_rates(part: Part, losses: dict[Trial, float]) -> dict[str, float]:
    """The rate of each variant with the lowest mean over all seeds of the part; variants without all are left out."""
    means = _means_over_seeds(part, losses)
    return {
        variant: min(means[variant], key=lambda rate: (means[variant][rate], rate))
        for variant in part.variants
        if variant in means
    }


def _means_over_seeds(part: Part, losses: dict[Trial, float]) -> dict[str, dict[float, float]]:
    """Variant -> rate -> mean loss, of the rates that have run with all seeds of the part."""
    by_rate: dict[tuple[str, float], list[float]] = defaultdict(list)
    for trial, loss in losses.items():
        if trial.part == part.name:
            by_rate[trial.variant, trial.learning_rate].append(loss)
    means: dict[str, dict[float, float]] = defaultdict(dict)
    for (variant, rate), values in by_rate.items():
        if len(values) == part.seeds:
            means[variant][rate] = fmean(values)
    return means


def trial_of(row: dict) -> Trial:
    """The run of which a row of the table tells."""
    return Trial(row["part"], row["variant"], float(row["learning_rate"]), int(row["seed"]))


def as_rows(trials: Iterable[Trial]) -> list[dict]:
    """Runs as they are sent to a worker."""
    return [asdict(trial) for trial in trials]
