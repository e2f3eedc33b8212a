"""The run folder: write it, read it, gather many into a table.

    config.json        everything that determines the run; its hash is the run's identity
    job.json           which plan, arm and replicate it is, where a plan ran it; not part of its identity
    environment.json   where and with what it ran
    split.csv          id, part and group of every image used; under "grouped" no group is in two parts
    history.csv        one row per epoch
    predictions.csv    test part, weights of the best validation epoch: id, label, probability of each class;
                       predictions_last.csv: weights of the last epoch; predictions_ema.csv: their moving average
    best.safetensors, last.safetensors   weights of the best validation epoch and of the last; ema.safetensors, if asked for
    checkpoint.pt      while it runs: all that is needed to go on; checkpoint_before.pt: the one before
    run.ipynb          the executed notebook, where a plan ran it
    checksums.json     SHA-256 of weights and tables, and the configuration that they are of
    metrics.json       written last: a run is finished if it is there and whole

What is damaged is renamed to NAME~damaged when its run starts again (`mend`), and made anew from the best state that is whole:
the checkpoint, the one before, the weights of a finished run, or the start.

A published plan holds the same of all its runs in a few files (`hdkd_lib.packing`); `Run` and `load` read both.
"""  # fmt: skip

import functools
import hashlib
import json
import lzma
import os
import platform
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn

from hdkd_lib import metrics, models
from hdkd_lib.metrics import Predictions
from hdkd_lib.parameters import one_sentence

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("config.json", "job.json", "environment.json", "metrics.json", "checksums.json")
CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")
_NO_NAMES_ARE_MISSING = {"keep_default_na": False, "na_values": [""]}  # a class may be called None
PACKED = "runs.json.xz"  # of a folder of packed runs (`hdkd_lib.packing`)
PREDICTIONS = {"last": "predictions_last.csv", "best": "predictions.csv", "ema": "predictions_ema.csv"}
# What older runs call otherwise in their config.json, by its sections.
OLD_NAMES = {"method": {"kind": "distill_type", "stage1_fraction": "distill_until"}, "recipe": {"repeats": "aug_repeats"}}
# Options that are no more, with the value that all runs since have; and one that came later, with the value of those before.
GONE = {"stage_exponent": 1.0, "projection": False}
NEW = {"Supervised": {"probe": False}, "DeiT": {"standardise_logits": False}}
NEW_IN_RECIPES = {"layer_decay": 1.0, "ema": 0.0}


def results_dir() -> Path:
    """The folder results/ of the study: $HDKD_RESULTS, else beside the library in its clone, else in the working directory."""
    if "HDKD_RESULTS" in os.environ:
        return Path(os.environ["HDKD_RESULTS"]).expanduser()
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "results"


def from_root(path: str | Path) -> Path:
    """A folder as texts name it ("results/published/smoke"), from every working directory.

    What is not in the working directory is looked for where results/ lies, and in the clone. A folder that is yet to be made
    goes where the first of its parents is.
    """
    path = Path(path).expanduser()
    for there in (path, path.parent / PACKED, Path(*path.parts[:1])):  # packed runs have no folders
        for base in (Path(), results_dir().parent, ROOT):
            if (base / there).exists():
                return base / path
    return path


def read_json(path: Path) -> dict | None:
    """The content of a JSON file; None if it is not there, or no JSON object (half-written, empty, damaged)."""
    try:
        content = json.loads(path.read_text()) if path.exists() else None
    except ValueError:  # of the JSON or of its encoding
        content = None
    return content if isinstance(content, dict) else None


def read_config(path: Path) -> dict:
    """A config.json, under the names of today."""
    return _todays_names(_read_whole(path))


def _read_whole(path: Path) -> dict:
    if (content := read_json(path)) is None:
        raise ValueError(f"{path} is {'damaged' if path.exists() else 'missing'}; start the run again, which makes it anew")
    return content


def _todays_names(config: dict) -> dict:
    for section, names in OLD_NAMES.items():
        if section in config:
            config[section] = {names.get(key, key): value for key, value in config[section].items()}
    if "method" in config:
        kept = {key: value for key, value in config["method"].items() if GONE.get(key) != value or key not in GONE}
        config["method"] = NEW.get(kept.get("name"), {}) | kept
    if "recipe" in config:
        config["recipe"] = NEW_IN_RECIPES | config["recipe"]
    return config


def config_hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a file beside `path` and renames it: readers see the old content or the new, never half of it.

    Raises:
        OSError: the disk is full or read-only; the old content stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        aside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        aside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; free some space and start again, what is finished is kept") from error


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda aside: aside.write_text(_as_text(content)))


def _as_text(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Held while a run folder is set aside, mended, created or trained in: of two processes the second waits.

    The lock lies beside the folder, whose name may come to mean another folder. It is released when its holder dies.

    Raises:
        filelock.Timeout: another process holds it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        held.acquire(timeout=1 if wait else 0)
    except filelock.Timeout:
        if not wait:
            raise
        print(f"waiting for another process that trains in this folder: {path.name}")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def set_aside(path: Path, mark: str) -> Path:
    """Renames a file or folder to NAME~MARK, or, where that is taken, NAME~MARK~, NAME~MARK~~, ..."""
    aside = path.with_name(f"{path.name}~{mark}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}~")
    return path.rename(aside)


def set_damaged_aside(path: Path) -> None:
    aside = set_aside(path, "damaged")
    print(f"{path} is damaged: it was renamed to {aside.name} and will be made anew")


def remove_unfinished(folder: Path) -> None:
    """Removes what `write_atomically` had begun when its process was killed; the caller holds the folder's lock."""
    for file in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", file.name):
            file.unlink(missing_ok=True)


def mend(folder: Path, *, weights: bool = True) -> None:
    """Sets aside what is damaged in a run folder; the caller holds its lock.

    A run that lost a file is no longer finished: what is missing is written anew when it starts, from its weights if they are
    whole. Where the checksums themselves are damaged nothing can be verified, and the run is trained again. Of a run from
    before there were checksums, only documents and checkpoints are known to be damaged.

    Args:
        weights: whether weights are looked at; a run whose weights nobody needs stays finished without them.
    """
    remove_unfinished(folder)
    lost = {name for name in DOCUMENTS if (folder / name).exists() and read_json(folder / name) is None}
    lost |= {name for name in CHECKPOINTS if (folder / name).exists() and not _is_checkpoint(folder / name)}
    if not lost & set(CHECKPOINTS) and _is_changed(folder):
        lost.add("config.json")
    for name, digest in checksums(folder).items():
        is_weights = name.endswith(".safetensors")  # which may have been removed to save space
        if not (folder / name).exists():
            is_lost = not is_weights and name != "metrics.json"
        else:
            is_lost = (weights or not is_weights) and _digest(folder / name) != digest
        lost |= {name} if is_lost else set()
    if lost - {"job.json"} and "metrics.json" not in lost:  # first, since this process may be killed, too
        (folder / "metrics.json").unlink(missing_ok=True)
    for name in sorted(lost):
        if (folder / name).exists():
            set_damaged_aside(folder / name)
        else:
            print(f"{folder / name} is missing and will be made anew")
    if lost - {"job.json"}:
        _forget_checksums(folder, lost | {"metrics.json"})


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of files in a run folder that do not change any more, by name; {} where none are known."""
    return (read_json(folder / "checksums.json") or {}).get("files", {})


def write_checksums(run: "Run", names: Iterable[str], measured: dict | None = None) -> None:
    """checksums.json of these files, and of the metrics.json that will be written next."""
    files = {name: _digest(run.path / name) for name in names}
    if measured:
        files["metrics.json"] = hashlib.sha256(_as_text(measured).encode()).hexdigest()
    write_json(run.path / "checksums.json", {"config_hash": config_hash(run.config), "files": files})


def _forget_checksums(folder: Path, names: Iterable[str]) -> None:
    if known := read_json(folder / "checksums.json"):
        files = {name: digest for name, digest in checksums(folder).items() if name not in names}
        write_json(folder / "checksums.json", known | {"files": files})


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _is_checkpoint(file: Path) -> bool:
    """Whether a checkpoint is whole: PyTorch writes a checksum (CRC-32) of each of its parts, and does not look at it again."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None and isinstance(torch.load(file, "cpu", weights_only=True, mmap=True), dict)
    except MemoryError:
        raise
    except Exception:  # zipfile, zlib, pickle and torch raise many kinds for damaged bytes
        return False


def _configuration(folder: Path) -> str | None:
    """The hash of the configuration that a folder's run is of; "unknown" if nothing that is whole says so, None for no run."""
    if (folder / "config.json").exists():
        return config_hash(read_config(folder / "config.json"))
    for name in ("metrics.json", "checksums.json"):
        if document := read_json(folder / name):
            return document.get("config_hash", "unknown")
    has_checkpoint = any((folder / name).exists() for name in CHECKPOINTS)
    return _told_by_checkpoint(folder) or ("unknown" if has_checkpoint else None)


def _told_by_checkpoint(folder: Path) -> str | None:
    """The hash of the configuration that a folder's checkpoint is of; None if there is none, or none that says so."""
    for name in CHECKPOINTS:
        if (folder / name).exists():
            return torch.load(folder / name, "cpu", weights_only=True, mmap=True).get("config_hash")
    return None


def _is_changed(folder: Path) -> bool:
    """Whether config.json is of another configuration than the checkpoint beside it: a bit of it may have changed."""
    config, told = read_json(folder / "config.json"), _told_by_checkpoint(folder)
    return None not in (config, told) and told not in (config_hash(config), config_hash(_todays_names(config)))


def place(path: str | Path | None, config: dict) -> Path:
    """The folder of a run: `path`, or by default one in results/runs/interactive/ that is named after the configuration."""
    name = f"{config['data']['dataset']}-{config['method']['name']}-seed{config['seed']}-{config_hash(config)}"
    return from_root(path) if path else results_dir() / "runs" / "interactive" / name


class Run:
    """A run. `Run(path)` reads its folder, or what is packed of it beside; `Run.create(path, config)` starts or resumes one."""

    @one_sentence
    def __init__(self, path: str | Path):
        self.path = from_root(path)
        self._packed = None if (self.path / "config.json").exists() else packed(self.path.parent).get(self.path.name)
        if self._packed is None and not (self.path / "config.json").exists():
            raise FileNotFoundError(f"{self.path} is no run folder: it has no config.json")
        self.config = _todays_names(self._document("config"))

    @classmethod
    def create(cls, path: str | Path | None, config: dict) -> "Run":
        """The run of this configuration in `path`, mended, by default under a name of its own (`place`).

        A run of another configuration that lies there is kept: it is renamed to NAME~HASH. Who trains holds the `lock` of
        `place(path, config)` from before this call.
        """
        path = place(path, config)
        mend(path)
        if (other := _configuration(path)) not in (None, config_hash(config)):
            print(f"{path} holds a run of another configuration: it was renamed to {set_aside(path, other).name}")
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists():
            write_json(path / "config.json", config)
        return cls(path)

    @property
    def shown_path(self) -> str:
        """The path for readers: from results/ on where it lies there, which `Run` finds from every working directory."""
        results, path = results_dir().resolve(), self.path.resolve()
        return path.relative_to(results.parent).as_posix() if path.is_relative_to(results) else str(self.path)

    @property
    def is_finished(self) -> bool:
        return self._packed is not None or read_json(self.path / "metrics.json") is not None

    @property
    def file(self) -> Path:
        """The file that says that the run is finished: its metrics.json, or the file that it is packed in."""
        return self.path / "metrics.json" if self._packed is None else self.path.parent / PACKED

    @property
    def metrics(self) -> dict:
        """`best` and `last`: epoch, validation and test metrics; `seconds` of training, `parameters` of the student.

        `last` has the accuracy on the training images, without augmentation, too.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        if not self.is_finished:
            raise FileNotFoundError(f"the run {self.path} is not finished: start it again, it goes on from its last epoch")
        return self._document("metrics")

    @property
    def job(self) -> dict:
        """`plan`, `arm` and `replicate`; without a job.json the arm is read from the folder's name, ARM-seedS..."""
        if self._has("job"):
            return self._document("job")
        kept = ("fold", "fraction") if self.config["data"].get("fraction", 1) < 1 else ("fold",)
        replicate = {"seed": self.config["seed"]} | {key: self.config["data"].get(key) for key in kept}
        return {"arm": self.path.name.rsplit("-seed", 1)[0], "replicate": replicate}

    @property
    def environment(self) -> dict:
        return self._document("environment")

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch."""
        if self._packed is None:
            return pd.read_csv(self._checked("history.csv"))
        table = packed_table(self.path.parent, "history")
        return table[table.run == self.path.name].drop(columns="run").dropna(axis=1, how="all").reset_index(drop=True)

    @property
    def split(self) -> pd.DataFrame:
        """id and part of every image used, and its group."""
        if self._packed is None:
            return pd.read_csv(self._checked("split.csv"), dtype={"id": str}, **_NO_NAMES_ARE_MISSING)
        table = packed_table(self.path.parent, "splits")
        key = self._packed.get("split") or self.config["data"]["split"]
        return table[table.split == key].drop(columns="split").dropna(axis=1, how="all")

    def predictions(self, epoch: str = "best") -> Predictions:
        """Of the test part, by the weights of the "best" validation epoch, of the "last", or their moving average ("ema").

        Raises:
            FileNotFoundError: they are not there; runs before there was a choice kept those of the best epoch only.
        """
        classes = self.config["data"]["classes"]
        if self._packed is None:
            if not (self.path / PREDICTIONS[epoch]).exists():
                raise FileNotFoundError(f"{self.path} holds no predictions of its {epoch} epoch")
            table = pd.read_csv(self._checked(PREDICTIONS[epoch]), dtype={"id": str, "label": str}, **_NO_NAMES_ARE_MISSING)
            probabilities = table[list(map(str, classes))].to_numpy()
            return Predictions.of(table.id, table.label.map(list(map(str, classes)).index), probabilities)
        table, own = packed_table(self.path.parent, "predictions"), f"{self.path.name} {epoch}"
        columns = [f"{own} {c}" for c in range(len(classes))]
        columns = [c for c in (*columns, f"{own} class", f"{own} percent") if c in table]
        if not columns:
            raise FileNotFoundError(f"{self.path.parent} holds no predictions of the {epoch} epoch of {self.path.name}")
        table = table[columns].dropna().reset_index()
        if columns[0] == f"{own} 0":
            whole = table[columns[: len(classes)]].to_numpy(float)
            if whole.min() < 0:  # hundredths of log odds, as not all classes are likelier than not
                whole = 1 / (1 + np.exp(-whole / 100))
            found = Predictions.of(table.id, table.label, whole)
            if f"{own} class" in table:  # rounded odds can be equal
                found = replace(found, predicted=table[f"{own} class"].to_numpy(int))
            return found
        predicted = table[f"{own} class"].to_numpy(int)
        confidence = table[f"{own} percent"].to_numpy(float) / 100 if f"{own} percent" in table else np.full(len(table), np.nan)
        return Predictions(table.id.to_numpy(), table.label.to_numpy(int), predicted, confidence)

    def _has(self, name: str) -> bool:
        return (self.path / f"{name}.json").exists() if self._packed is None else name in self._packed

    def _document(self, name: str) -> dict:
        return _read_whole(self.path / f"{name}.json") if self._packed is None else self._packed[name]

    def _checked(self, name: str) -> Path:
        """A file of a finished run, once its checksum is that of what was written."""
        file, digest = self.path / name, checksums(self.path).get(name) if self.is_finished else None
        if digest and file.exists() and _digest(file) != digest:
            raise ValueError(f"{file} is damaged: its checksum has changed; start the run again, which makes it anew")
        return file

    def student(self, which: str = "best") -> nn.Module:
        """The trained network in eval mode, with the weights of the "best" validation epoch, of the "last" or averaged ("ema").

        It remembers the images that it has seen (`trained_on`), so that it cannot teach where they are test images.
        """
        creation = self.config["method"]["student"]
        model = models.create(**{key: value for key, value in creation.items() if key != "pretrained"})
        if self._packed is not None:
            raise FileNotFoundError(
                f"{self.path} is published without weights; train it: make study PLAN={self.path.parent.name}"
            )
        split = self.split
        model.trained_on = self.config["data"] | {
            "ids": set(split.id[split.part != "test"]),
            "protocol_of_training": self.config["recipe"].get("protocol", "honest"),
        }
        return models.load_weights(model, self._checked(f"{which}.safetensors")).eval()


def packed(folder: str | Path) -> dict[str, dict]:
    """The runs packed in `folder` by name: `config`, `job`, `environment` and `metrics` of each; {} where nothing is packed."""
    file = Path(folder) / PACKED
    return _read_once(str(file), file.stat().st_mtime_ns) if file.exists() else {}


def packed_table(folder: str | Path, name: str) -> pd.DataFrame | None:
    """ "history", "splits" or "predictions" of packed runs; the last is indexed by id and label (index of the class)."""
    file = Path(folder) / f"{name}.csv.xz"
    return _read_once(str(file), file.stat().st_mtime_ns) if file.exists() else None


@functools.lru_cache(maxsize=24)
def _read_once(file: str, changed: int) -> dict | pd.DataFrame:
    if Path(file).name == PACKED:
        return json.loads(lzma.decompress(Path(file).read_bytes()))
    table = pd.read_csv(file, dtype={"id": str, "split": str, "group": str}, **_NO_NAMES_ARE_MISSING)
    return table.set_index(["id", "label"]) if "label" in table else table


def plan(folder: str | Path) -> dict:
    """What the plan of these runs says (its YAML file, with what it extends), from plan.json; {} where there is none.

    `questions_changed_after` is how many runs were finished when its questions changed, if they did.
    """
    return read_json(from_root(folder) / "plan.json") or {}


@one_sentence
def load(folder: str | Path) -> pd.DataFrame:
    """One row per finished run in `folder` (searched two levels deep), packed or not: configuration and metrics, flat.

    Networks trained without a teacher come first, then by name. Columns: run (the arm, with the fraction of the training part
    if that is not 1), arm, replicate, path, method, student, teacher, dataset, image_size, protocol, fold, fraction, draw,
    patients ("declared" or "not known": which images are of one), seed, epochs, epoch, parameters, seconds, images_per_second,
    synthesis_seconds (of making images from the teacher), selection (the part that chose the epoch), precision, device, commit,
    the test metrics of the chosen epoch (`last_...` those of the last epoch, `ema_...` of the moving average), and
    last_train_accuracy, on the training images without augmentation.
    What older runs did not record is nan, or no column where all are older.

    Raises:
        FileNotFoundError: no finished run is there.
        ValueError: a published plan of an older form, or one whose files are not those of its manifest.
    """
    folder = from_root(folder)
    for manifest in (folder / "manifest.json", *folder.glob("*/manifest.json")):
        if manifest.exists():
            _check_published(manifest)
    found = {f.parent for pattern in ("metrics.json", "*/metrics.json", "*/*/metrics.json") for f in folder.glob(pattern)}
    for place in (folder, *folder.glob("*/")):
        found |= {place / name for name in packed(place)}
    rows = []
    for run in (Run(path) for path in sorted(found) if "~" not in path.name):
        if not run.is_finished:
            continue
        config, metrics, job, where = run.config, run.metrics, run.job, run.environment
        data, method = config["data"], config["method"]
        rows.append(
            {
                "run": job["arm"] + (f" {data['fraction']:.0%}" if data["fraction"] < 1 else ""),
                "arm": job["arm"],
                "replicate": ", ".join(f"{key} {value}" for key, value in job["replicate"].items()),
                "path": str(run.path),
                "method": method["name"],
                "student": method["student"]["name"],
                "teacher": method.get("teacher", {}).get("name", ""),
                **{key: data[key] for key in ("dataset", "image_size", "protocol", "fold", "fraction")},
                "draw": data.get("draw", np.nan),
                **({"patients": "not known" if data["groups"] is None else "declared"} if "groups" in data else {}),
                "seed": config["seed"],
                "epochs": config["recipe"]["epochs"],
                "epoch": metrics["best"]["epoch"],
                **{key: metrics[key] for key in ("parameters", "seconds", "images_per_second")},
                **{key: metrics[key] for key in ("synthesis_seconds",) if key in metrics},
                "selection": "test" if config["recipe"].get("protocol") == "paper" else "validation",
                "precision": config["precision"],
                "device": where["device"],
                "commit": where.get("commit", ""),
                **{key: value for key, value in metrics["best"]["test"].items() if key != "confusion"},
                **{
                    f"{epoch}_{key}": value
                    for epoch in ("last", "ema")
                    for key, value in metrics.get(epoch, {}).get("test", {}).items()
                    if key != "confusion"
                },
                "last_train_accuracy": metrics["last"].get("train", {}).get("accuracy", np.nan),
            }
        )
    if not rows:
        raise FileNotFoundError(f"no finished run in {folder}; run a plan first: make study PLAN=smoke")
    return pd.DataFrame(rows).sort_values(
        ["method", "arm", "fraction", "seed", "fold"],
        key=lambda c: c != "Supervised" if c.name == "method" else c,
        ignore_index=True,
    )


def remeasure(folder: str | Path) -> int:
    """Measures the predictions of all finished runs in `folder` again, when `metrics.classification` has changed.

    The test metrics in their metrics.json are written anew; those of validation, whose predictions are not kept, stay. Gives
    the number of runs.

    Raises:
        FileNotFoundError: no finished run is there, or one without predictions, as those that were published are (they keep too
            little of most to be measured again); nothing has changed then.
    """
    found = sorted(path.parent for path in from_root(folder).glob("*/metrics.json") if "~" not in path.parent.name)
    found = [path for path in found if Run(path).is_finished]
    if not found:
        raise FileNotFoundError(f"no finished run in {folder}; give a plan's folder in results/runs")
    if without := [path for path in found if not (path / PREDICTIONS["best"]).exists()]:
        raise FileNotFoundError(f"{without[0]} has no predictions ({len(without)} such runs); move these folders away")
    for run in map(Run, found):
        measured = run.metrics
        for epoch in measured.keys() & PREDICTIONS:
            of = run.predictions(epoch)
            scores = metrics.classification(torch.tensor(of.probabilities).float(), torch.tensor(of.labels))
            measured[epoch]["test"] = scores
        _forget_checksums(run.path, ["metrics.json"])
        write_json(run.path / "metrics.json", measured)
    return len(found)


def _check_published(manifest: Path) -> None:
    folder, plan = manifest.parent, manifest.parent.name
    if not (folder / PACKED).exists():
        raise ValueError(f"{folder} was published in an older form; publish it anew: make publish PLAN={plan}")
    for name, digest in json.loads(manifest.read_text())["files"].items():
        file = folder / name
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            what = "is missing" if not file.exists() else "is not the file that was published"
            raise ValueError(f"{file} {what}; restore {folder}, or publish the plan anew: make publish PLAN={plan}")


def environment(device: torch.device, before: dict | None = None) -> dict:
    """Where a run happens: versions, hardware, threads, the commit of the study and the time (UTC).

    Args:
        before: the environment in which it was begun, if it goes on: other commits stay as `earlier_commits`.
    """

    def git(*arguments: str) -> str | None:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    before, commit = before or {}, git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "hdkd_lib", "notebooks")
    earlier = {*before.get("earlier_commits", ()), before.get("commit", commit)} - {commit}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        **({"earlier_commits": sorted(map(str, earlier))} if earlier else {}),
        "uncommitted_changes": bool(changes or before.get("uncommitted_changes")),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
