"""Tables from run folders."""

import math
from pathlib import Path

import pandas as pd

from hdkd_lib.statistics import interval, paired

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "ece": "ECE",
}


def summary(frame: pd.DataFrame, *, baseline: str = "student", compare: str = "balanced_accuracy") -> pd.DataFrame:
    """One row per kind of run (column `run` of `runs.load`): test metrics in percent, mean ± 95 % t interval over replicates.

    The last columns hold the difference of `compare` to `baseline`, paired by seed and fold, in percentage points with its
    interval and the paired t-test's p; empty for the baseline and where nothing pairs.
    """
    keys = ["seed", "fold"]
    rows = {}
    for name, group in frame.groupby("run", sort=False):
        row = {"network": group.student.iloc[0], "parameters": f"{group.parameters.iloc[0]:,}", "runs": len(group)}
        row |= {title: str(interval(group[metric])) for metric, title in METRICS.items()}
        pairs = group.merge(frame[frame.run == baseline], on=keys, suffixes=("", "_baseline"))
        row |= {f"Δ {METRICS[compare]} to {baseline}": "", "p": ""}
        if name != baseline and len(pairs):
            difference = paired(pairs[compare], pairs[f"{compare}_baseline"])
            row[f"Δ {METRICS[compare]} to {baseline}"] = f"{100 * difference.mean:+.1f}" + (
                "" if math.isnan(difference.half_width) else f" ± {100 * difference.half_width:.1f}"
            )
            row["p"] = "" if math.isnan(difference.p) else f"{difference.p:.2g}"
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run").reset_index()


def provenance(frame: pd.DataFrame) -> str:
    """One sentence: what the numbers of `summary` are of."""
    first = frame.iloc[0]
    seeds, folds = (", ".join(map(str, sorted(frame[key].unique()))) for key in ("seed", "fold"))
    epochs = "/".join(map(str, sorted(frame.epochs.unique())))
    chosen = " and ".join(sorted(set(frame.selection)))
    if "test" in chosen:
        chosen += " (the paper's protocol: optimistic)"
    return (
        f"{first.dataset} at {first.image_size} px, {first.protocol} split (folds {folds}), seeds {seeds}, {epochs} epochs, "
        f"{first.precision}; test part, epoch chosen on {chosen}; mean ± 95 % t interval in percent, "
        "differences paired by seed and fold."
    )


def write(frame: pd.DataFrame, folder: str | Path) -> None:
    """runs.csv (a row per run), summary.csv and summary.md (with its provenance) in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame.drop(columns="path").to_csv(folder / "runs.csv", index=False)
    table = summary(frame)
    (folder / "summary.md").write_text(f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{provenance(frame)}\n")
    table.to_csv(folder / "summary.csv", index=False)


def metrics(measured: dict) -> pd.DataFrame:
    """The metrics of one run (`Run.metrics`): validation and test, of the best validation epoch and of the last."""
    columns = {
        f"{which} epoch, {part}": {title: measured[which][part][key] for key, title in METRICS.items()}
        for which in ("best", "last")
        for part in ("val", "test")
    }
    return pd.DataFrame(columns).map("{:.3f}".format)
