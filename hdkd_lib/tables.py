"""Tables from run folders."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from hdkd_lib.runs import Run
from hdkd_lib.statistics import Estimate, false_discoveries, interval, paired

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "ece": "ECE",
}
REPLICATE = ["seed", "fold", "fraction"]  # what two runs have in common that are compared as a pair
SELECTION = {"validation": "validation", "test": "test (the paper's protocol: optimistic)"}


def summary(frame: pd.DataFrame, *, baseline: str = "student", compare: str = "balanced_accuracy") -> pd.DataFrame:
    """One row per kind of run (column `run` of `runs.load`): test metrics in percent, mean ± 95 % t interval over replicates.

    The last columns hold the difference of `compare` to the kind of run `baseline`, paired by seed, fold and fraction, in
    percentage points with its interval, the paired t-test's p, and q, p after Benjamini and Hochberg's control of false
    discoveries over the table's rows; empty for the baseline and where nothing pairs.
    """
    rows, p = {}, {}
    for name, group in frame.groupby("run", sort=False):
        row = {"network": group.student.iloc[0], "parameters": f"{group.parameters.iloc[0]:,}", "runs": len(group)}
        row["epoch chosen on"] = SELECTION[group.selection.iloc[0]]
        row |= {title: str(interval(group[metric])) for metric, title in METRICS.items()}
        pairs = group.merge(frame[frame.kind == baseline], on=REPLICATE, suffixes=("", "_baseline"))
        row |= {f"Δ {METRICS[compare]} to {baseline}": "", "p": "", "q": ""}
        if group.kind.iloc[0] != baseline and len(pairs):
            difference = paired(pairs[compare], pairs[f"{compare}_baseline"])
            row |= {f"Δ {METRICS[compare]} to {baseline}": f"{difference:+}", "p": _p(difference.p)}
            p[name] = difference.p
        rows[name] = row
    for name, q in zip(p, false_discoveries(list(p.values())), strict=True):
        rows[name]["q"] = _p(q)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run").reset_index()


def ablations(frame: pd.DataFrame, *, reference: str = "hdkd", compare: str = "balanced_accuracy") -> pd.DataFrame:
    """One row per kind of run that trains as `reference` does but for what `change` says, read from the run folders.

    Columns: run; parameters, the names of those changed; change, such as "alpha 0.5 → 0.75" ("default" is the network's own);
    runs; mean and half_width of `compare`; difference to the reference paired by seed and fold, its half width, p; and q,
    p after Benjamini and Hochberg's control of false discoveries over all rows, since of many changes some differ by chance.
    Kinds of another method come last, named by it.

    Raises:
        ValueError: there is no kind of run named `reference`, or none that pairs with it.
    """
    if reference not in set(frame.run):
        raise ValueError(f"no run is named {reference!r}; there are {', '.join(frame.run.unique())}")
    settings = {kind: Run(group.path.iloc[0]).settings for kind, group in frame.groupby("run")}
    base, rows = settings[reference], []
    for kind, group in frame.groupby("run", sort=False):
        own = settings[kind]
        changed = sorted(key for key in own.keys() | base.keys() if own.get(key) != base.get(key))
        if own["method"] != base["method"]:
            changed, change = ["method"], f"{own['method']}, {kind}"
        else:
            change = ", ".join(f"{key} {base.get(key, 'default')} → {own.get(key, 'default')}" for key in changed)
        pairs = group.merge(frame[frame.run == reference], on=REPLICATE, suffixes=("", "_reference"))
        if kind == reference or not len(pairs):
            continue
        score, difference = interval(group[compare]), paired(pairs[compare], pairs[f"{compare}_reference"])
        rows.append(
            {
                "run": kind,
                "parameters": ", ".join(changed),
                "change": change.replace("_", " "),
                "runs": len(group),
                "mean": score.mean,
                "half_width": score.half_width,
                "difference": difference.mean,
                "difference_half_width": difference.half_width,
                "p": difference.p,
            }
        )
    if not rows:
        raise ValueError(f"nothing can be compared with {reference!r}: no other run has its seeds and folds")
    table = pd.DataFrame(rows)
    table["q"] = false_discoveries(table.p)
    return table.sort_values(["parameters", "run"], key=lambda c: (c == "method").astype(str) + c, ignore_index=True)


def optimism(frame: pd.DataFrame, compare: str = "balanced_accuracy") -> pd.DataFrame:
    """What the paper's protocol adds to a result: kinds of run that chose their epoch on the test part beside honest twins.

    Columns: run, honest (the kind that differs from it in the protocol alone), and in percent its score on the test part, its
    score at the last epoch, which nothing chose, the honest kind's score, the paired difference to that, and its p.
    """
    settings = {kind: Run(group.path.iloc[0]).settings | {"protocol": None} for kind, group in frame.groupby("run")}
    rows = []
    for kind, group in frame[frame.selection == "test"].groupby("run", sort=False):
        for twin, other in frame[frame.selection == "validation"].groupby("run", sort=False):
            pairs = group.merge(other, on=REPLICATE, suffixes=("", "_honest"))
            if settings[twin] == settings[kind] and len(pairs):
                difference = paired(pairs[compare], pairs[f"{compare}_honest"])
                scores = {
                    "chosen on test": compare,
                    "last epoch": f"last_{compare}",
                    "chosen on validation": f"{compare}_honest",
                }
                row = {name: str(interval(pairs[column])) for name, column in scores.items()}
                rows.append({"run": kind, "honest": twin, **row, "Δ": f"{difference:+}", "p": _p(difference.p)})
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame, compare: str = "balanced_accuracy") -> pd.DataFrame:
    """A table of `ablations` in percent and percentage points."""
    estimates = [
        (Estimate(row["mean"], row.half_width, row.runs), Estimate(row.difference, row.difference_half_width, row.runs))
        for _, row in table.iterrows()
    ]
    return pd.DataFrame(
        {
            "run": table.run,
            "change": table.change,
            "runs": table.runs,
            METRICS[compare]: [str(score) for score, _ in estimates],
            "Δ": [f"{difference:+}" for _, difference in estimates],
            "p": table.p.map(_p),
            "q": table.q.map(_p),
        }
    )


def provenance(frame: pd.DataFrame) -> str:
    """One sentence: what the numbers of `summary` are of."""
    first = frame.iloc[0]
    seeds, folds = (", ".join(map(str, sorted(frame[key].unique()))) for key in ("seed", "fold"))
    epochs = "/".join(map(str, sorted(frame.epochs.unique())))
    chosen = " and ".join(SELECTION[part] for part in sorted(set(frame.selection)))
    changed = frame.attrs.get("questions_changed_after")
    return (
        f"{first.dataset} at {first.image_size} px, {first.protocol} split (folds {folds}), seeds {seeds}, {epochs} epochs, "
        f"{first.precision}; test part, epoch chosen on {chosen}; mean ± 95 % t interval in percent, "
        "differences paired by seed and fold." + (f" Questions changed after {changed} runs." if changed else "")
    )


def write(frame: pd.DataFrame, folder: str | Path, baseline: str = "student") -> None:
    """runs.csv (a row per run), summary.csv and summary.md (with its provenance) in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame.drop(columns="path").to_csv(folder / "runs.csv", index=False)
    table = summary(frame, baseline=baseline)
    (folder / "summary.md").write_text(f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{provenance(frame)}\n")
    table.to_csv(folder / "summary.csv", index=False)


def write_ablations(table: pd.DataFrame, folder: str | Path, frame: pd.DataFrame, compare: str = "balanced_accuracy") -> None:
    """ablations.csv (numbers) and ablations.md (for readers, with its provenance) in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "ablations.csv", index=False)
    markdown = readable(table, compare).to_markdown(index=False, disable_numparse=True)
    (folder / "ablations.md").write_text(f"{markdown}\n\n{provenance(frame)}\n")


def metrics(measured: dict) -> pd.DataFrame:
    """The metrics of one run (`Run.metrics`): validation and test, of the best validation epoch and of the last."""
    columns = {
        f"{which} epoch, {part}": {title: measured[which][part][key] for key, title in METRICS.items()}
        for which in ("best", "last")
        for part in ("val", "test")
    }
    return pd.DataFrame(columns).map("{:.3f}".format)


def test_scores(trained: Mapping[str, Run]) -> pd.DataFrame:
    """The test metrics of several runs, one row each, at the epoch that each has chosen."""
    rows = {name: run.metrics["best"]["test"] for name, run in trained.items()}
    return pd.DataFrame(rows, index=list(METRICS)).T.rename(columns=METRICS).map("{:.3f}".format)


def _p(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.2g}"
