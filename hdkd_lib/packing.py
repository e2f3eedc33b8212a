"""Many finished runs in four small files, without weights, and back. `runs.Run` and `runs.load` read them as they read folders.

    runs.json.xz        by run: config, job, environment, metrics, and split, the key of its split
    history.csv.xz      one row per run and epoch, numbers to six digits
    splits.csv.xz       one row per split and image: split, id, part, and group where images of one group stay together
    predictions.csv.xz  one row per test image: id, label (index of its class), and columns per run: at each epoch kept (last,
                        best, ema) the index of the predicted class ("RUN last class"); at the plan's one its probability in
                        percent ("RUN last percent") and, where the plan's metric needs them, of all classes the logarithm of
                        the odds p / (1 - p) in hundredths ("RUN last 0", ...), which keeps the order of images that a network
                        is sure of. Older plans hold the probabilities of both epochs with six digits
"""  # fmt: skip

import hashlib
import json
import lzma
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from hdkd_lib.runs import PACKED, PREDICTIONS, Run, packed, packed_table, write_atomically, write_json

DOCUMENTS = ("config", "job", "environment", "metrics")  # files NAME.json of a run folder
OF_CLASSES = ("accuracy", "balanced_accuracy", "macro_f1", "ece")  # metrics for which that suffices


def pack(
    folders: Mapping[str, Path],
    folder: Path,
    metric: str = "accuracy",
    epoch: str = "last",
    keep: Collection[str] | None = None,
) -> list[str]:
    """Adds the runs in these folders to what is packed in `folder`, and returns their names.

    A run that is packed already with the same metrics, or that was unpacked from there, stays as it is.

    Args:
        folders: run folders by name.
        metric: the plan's, which says whether predicted classes suffice.
        epoch: the plan's, whose probabilities are kept.
        keep: names of the runs that stay of what is packed there; None: all.
    """
    runs = {name: run for name, run in packed(folder).items() if keep is None or name in keep}
    new = {
        name: Run(path)
        for name, path in folders.items()
        if (path / PREDICTIONS["best"]).exists() and runs.get(name, {}).get("metrics") != Run(path).metrics
    }
    if not new and len(runs) == len(packed(folder)):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    histories, splits, predictions = (packed_table(folder, name) for name in ("history", "splits", "predictions"))
    old = runs.keys() - new.keys()
    used = {runs[name].get("split", runs[name]["config"]["data"].get("split")) for name in old}
    histories = [] if histories is None else [histories[histories.run.isin(old)]]
    splits = {} if splits is None else {key: of for key, of in splits.groupby("split", sort=False) if key in used}
    tables = [] if predictions is None else [predictions[[c for c in predictions if c.split(" ")[0] in old]]]
    for name, run in new.items():
        split = run.split
        # not the configuration's: a run on made images, or one that validates on the test part, has other parts
        key = hashlib.sha256(split.to_csv(index=False).encode()).hexdigest()[:12]
        runs[name] = {
            name: json.loads((run.path / f"{name}.json").read_text()) for name in ("config", "environment", "metrics")
        }
        runs[name] |= {"job": run.job, "split": key}
        histories.append(run.history.assign(run=name))
        splits.setdefault(key, split.assign(split=key))
        tables.append(_compact(run, metric, epoch).add_prefix(f"{name} "))
    history, joined = pd.concat(histories, ignore_index=True), pd.concat(tables, axis=1).sort_index()
    history.insert(0, "run", history.pop("run"))
    joined.index = joined.index.set_names(["id", "label"])
    whole = joined.columns[[not joined[c].dropna().mod(1).any() for c in joined]]
    splits = pd.concat(splits.values(), ignore_index=True)
    splits = splits[[c for c in ("split", "id", "part", "group") if c in splits]].sort_values(["split", "part", "id"])
    _write(history, folder / "history.csv.xz", index=False, float_format="%.6g")
    _write(splits, folder / "splits.csv.xz", index=False)
    _write(joined.astype(dict.fromkeys(whole, "Int16")), folder / "predictions.csv.xz")
    text = json.dumps(dict(sorted(runs.items())), separators=(",", ":"))
    # Last, since what it does not name is packed anew.
    write_atomically(folder / PACKED, lambda aside: aside.write_bytes(lzma.compress(text.encode(), preset=9)))
    return list(new)


def unpack(folder: Path, name: str, run_dir: Path) -> Path:
    """A run folder as it was packed: documents and history; without weights and predictions."""
    run, documents = Run(folder / name), packed(folder)[name]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "history.csv", lambda aside: run.history.to_csv(aside, index=False))
    for key in DOCUMENTS:  # metrics last: then it is finished
        write_json(run_dir / f"{key}.json", documents[key])
    return run_dir


def _compact(run: Run, metric: str, kept: str) -> pd.DataFrame:
    """What is kept of a run's predictions, by image."""
    columns, index = {}, None
    for epoch, file in PREDICTIONS.items():
        if not (run.path / file).exists():  # of runs before the last epoch's were saved
            continue
        of = run.predictions(epoch)
        index = pd.MultiIndex.from_arrays([of.ids, of.labels], names=["id", "label"])
        columns[f"{epoch} class"] = of.predicted
        if epoch == kept:
            columns[f"{epoch} percent"] = np.round(100 * of.confidence)
            if metric not in OF_CLASSES:
                p = of.probabilities.T
                odds = np.log(np.maximum(p, 1e-38) / np.maximum(1 - p, 1e-7))
                columns |= {f"{epoch} {c}": column for c, column in enumerate(np.round(100 * odds))}
    return pd.DataFrame(columns, index)


def _write(table: pd.DataFrame, path: Path, **options) -> None:
    # xz keeps no time, so that equal tables are equal files; it makes them a fifth smaller than gzip
    write_atomically(path, lambda aside: table.to_csv(aside, compression={"method": "xz", "preset": 9}, **options))
