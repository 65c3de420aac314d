"""The report of an analysis: one HTML file with all tables and pictures, which needs no network and runs no script."""

from dataclasses import fields
from pathlib import Path

from sorsa_ds.methods.registry import method_of
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.html_page import figure, page, safe, table
from sorsa_ds.study.analysis.figures import Picture
from sorsa_ds.study.analysis.runs import Run
from sorsa_ds.study.analysis.table import COLUMNS, Figures, Key

FILE = "report.html"
_NAMES = {
    "delta_sigma": "ΔΣ", "delta_d": "ΔD", "delta_d_matched": "ΔD matched",
    "delta_d_clustered": "ΔD clustered", "delta_d_subspace": "ΔD subspace",
    "swapping": "no turn", "condition_w": "κ(W)", "condition_u": "κ(U)", "condition_v": "κ(V)",
    "orthonormality_u": "‖UᵀU − I‖", "orthonormality_v": "‖VᵀV − I‖", "effective_rank": "effective rank",
    "stable_rank": "stable rank",
}  # fmt: skip


def write_report(runs: list[Run], pictures: list[Picture], rank: int, dtype: str, output: Path) -> Path:
    """Write report.html beside the files of its pictures; returns its path.

    Args:
        rank: the rank of the leading subspaces that were compared.
        dtype: the dtype in which weights were decomposed.
    """
    title = "Analysis of " + ", ".join(run.name for run in runs)
    parts = [
        "<h2>Runs</h2>", table(_RUN_HEADINGS, map(_run_cells, runs)),
        "<h2>At the end, mean over linears</h2>",
        table(["run", "step", "linears", *_NAMES.values()], map(_end_cells, runs)),
        f'<p class="note">Full decompositions of merged weights in {safe(dtype)} on the CPU, against the weights with '
        f"which training began. ΔΣ, ΔD: SORSA, eq. 1 to 4. Matched: under the best one-to-one matching of singular "
        f"triplets. Clustered: those with nearly equal singular values as one subspace; no turn: the share of ΔD that "
        f"is the rest, here of the mean ΔD. Subspace: of the first {rank} triplets. κ: largest over smallest nonzero "
        f"singular value.</p>",
        *(_figure(picture, output) for picture in pictures),
        "<h2>Every linear and step</h2><details><summary>all rows of measures.csv</summary>",
        table(COLUMNS, ([*_values(row.key), *_values(row.figures)] for run in runs for row in run.rows)),
        "</details>",
    ]  # fmt: skip
    write_text(output / FILE, page(title, parts))
    return output / FILE


_RUN_HEADINGS = [
    "run", "model", "method", "rank", "learning rate", "γ/η_d", "form", "reduction", "orthonormal every", "steps",
    "training loss", "held-out loss, before", "held-out loss, after", "trained numbers",
]  # fmt: skip


def _run_cells(run: Run) -> list:
    config, told = run.config, run.report
    reg: list[object] = [None] * 4
    if run.reg is not None:
        reg = [run.reg.coefficient, run.reg.form, run.reg.reduction, run.reg.reorthonormalize or None]
    return [
        run.name, config.model, config.method, config.adapter.rank if method_of(config).has_rank else None,
        config.train.learning_rate, *reg, told["steps"], told["loss_last"],
        told["eval_loss_start"], told["eval_loss_end"], told["trainable_parameters"],
    ]  # fmt: skip


def _end_cells(run: Run) -> list:
    end = run.steps[-1]
    linears = sum(row.key.step == end for row in run.rows)
    return [run.name, end, linears, *run.means_at_end().values()]


def _figure(picture: Picture, output: Path) -> str:
    caption = f"{picture.caption} As files: {picture.name}.png, {picture.name}.svg."
    return f"<h2>{safe(picture.title)}</h2>" + figure(
        (output / f"{picture.name}.png").read_bytes(), picture.title, caption
    )


def _values(part: Key | Figures) -> list:
    return [getattr(part, field.name) for field in fields(part)]
