"""Many finished runs in four small files, without weights, and back.

    runs.json           by run: config, job, environment, metrics
    history.csv.gz      one row per run and epoch
    predictions.csv.gz  one row per test image: id, label (index of its class), and per run and epoch (last, best) the index of
                        the predicted class and its probability in percent
    splits.csv.gz       one row per split and image: split (the hash in the runs' configurations), id, part
"""  # fmt: skip

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from hdkd_lib.runs import Run, write_atomically, write_json

PREDICTIONS = {"last": "predictions_last.csv", "best": "predictions.csv"}
DOCUMENTS = ("config", "job", "environment", "metrics")  # files NAME.json of a run folder


def read(folder: Path) -> dict[str, dict]:
    """The packed runs by name: `config`, `job`, `environment` and `metrics` of each; none where nothing is packed."""
    file = folder / "runs.json"
    return json.loads(file.read_text()) if file.exists() else {}


def pack(runs: Mapping[str, Path], folder: Path) -> list[str]:
    """Adds the runs in these folders to what is packed in `folder`, and returns their names.

    A run that is packed already with the same metrics, or that was unpacked from there, stays as it is.
    """
    packed = read(folder)
    new = {
        name: path
        for name, path in runs.items()
        if (path / PREDICTIONS["last"]).exists() and packed.get(name, {}).get("metrics") != Run(path).metrics
    }
    if not new:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    histories, splits, predictions = (_table(folder, name) for name in ("history", "splits", "predictions"))
    if histories is not None:
        histories = histories[~histories.run.isin(new)]
    for name, path in new.items():
        run = Run(path)
        packed[name] = {key: json.loads((path / f"{key}.json").read_text()) for key in DOCUMENTS}
        histories = pd.concat([histories, run.history.assign(run=name)], ignore_index=True)
        key = run.config["data"]["split"]
        if splits is None or key not in set(splits.split):
            splits = pd.concat([splits, pd.read_csv(path / "split.csv", dtype=str).assign(split=key)], ignore_index=True)
        own = _compact(path, run.config["data"]["classes"]).add_prefix(f"{name} ")
        predictions = (
            own if predictions is None else predictions.drop(columns=own.columns, errors="ignore").join(own, how="outer")
        )
    histories.insert(0, "run", histories.pop("run"))
    splits = splits[["split", "id", "part"]].sort_values(["split", "part", "id"])
    for name, table in (("history", histories), ("splits", splits)):
        _write(table, folder / f"{name}.csv.gz", index=False)
    _write(predictions.sort_index().astype("Int16"), folder / "predictions.csv.gz")
    write_json(folder / "runs.json", dict(sorted(packed.items())))  # last: what it does not name is packed anew
    return list(new)


def unpack(folder: Path, name: str, run_dir: Path) -> Path:
    """A run folder as it was packed: documents and history; without weights and predictions."""
    run_dir.mkdir(parents=True, exist_ok=True)
    history = _table(folder, "history")
    history = history[history.run == name].drop(columns="run").dropna(axis=1, how="all")
    write_atomically(run_dir / "history.csv", lambda aside: history.to_csv(aside, index=False))
    documents = read(folder)[name]
    for key in DOCUMENTS:  # metrics last: then it is finished
        write_json(run_dir / f"{key}.json", documents[key])
    return run_dir


def _compact(path: Path, classes: list[str]) -> pd.DataFrame:
    """Class and confidence of both epochs by image."""
    columns = {}
    for which, file in PREDICTIONS.items():
        table = pd.read_csv(path / file, dtype={"id": str, "label": str})
        table["label"] = table.label.map(classes.index)
        probabilities = table.set_index(["id", "label"])[classes]
        columns[f"{which} class"] = pd.Series(probabilities.to_numpy().argmax(1), probabilities.index)
        columns[f"{which} percent"] = (100 * probabilities.max(axis=1)).round().astype(int)
    return pd.DataFrame(columns)


def _table(folder: Path, name: str) -> pd.DataFrame | None:
    file = folder / f"{name}.csv.gz"
    if not file.exists():
        return None
    if name == "predictions":
        return pd.read_csv(file, dtype={"id": str}).set_index(["id", "label"]).astype("Int16")
    return pd.read_csv(file, dtype={"id": str, "split": str})


def _write(table: pd.DataFrame, path: Path, index: bool = True) -> None:
    compression = {"method": "gzip", "mtime": 0}  # equal tables are equal files
    write_atomically(path, lambda aside: table.to_csv(aside, index=index, compression=compression))
