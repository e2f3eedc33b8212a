"""The run folder: write it, read it, gather many into a table.

    config.json        everything that determines the run; its hash is the run's identity
    job.json           which plan, arm and replicate it is, where a plan ran it; not part of its identity
    environment.json   where and with what it ran
    split.csv          id and part of every image used
    history.csv        one row per epoch
    predictions.csv    test part, weights of the best validation epoch: id, label, probability of each class;
                       predictions_last.csv: weights of the last epoch
    best.safetensors, last.safetensors   weights of the best validation epoch and of the last
    checkpoint.pt      while it runs: all that is needed to go on
    run.ipynb          the executed notebook, where a plan ran it
    metrics.json       written last: a run is finished if it exists
"""  # fmt: skip

import hashlib
import inspect
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from importlib.metadata import version
from inspect import Parameter
from pathlib import Path

import filelock
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn

from hdkd_lib import methods, models
from hdkd_lib.recipes import Recipe

ROOT = Path(__file__).parents[1]
# What older runs call otherwise in their config.json, by its sections.
OLD_NAMES = {"method": {"kind": "distill_type", "stage1_fraction": "distill_until"}, "recipe": {"repeats": "aug_repeats"}}


def results_dir() -> Path:
    """The folder results/ of the study: $HDKD_RESULTS, else beside the library in its clone, else in the working directory."""
    if "HDKD_RESULTS" in os.environ:
        return Path(os.environ["HDKD_RESULTS"]).expanduser()
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "results"


def read_config(path: Path) -> dict:
    """A config.json, under the names of today."""
    config = json.loads(path.read_text())
    for section, names in OLD_NAMES.items():
        if section in config:
            config[section] = {names.get(key, key): value for key, value in config[section].items()}
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
    write_atomically(path, lambda aside: aside.write_text(json.dumps(content, indent=1) + "\n"))


class Run:
    """A run folder. `Run(path)` reads one; `Run.create(path, config)` starts or resumes one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise FileNotFoundError(f"{self.path} is no run folder: it has no config.json")
        self.config = read_config(self.path / "config.json")

    @classmethod
    def create(cls, path: str | Path | None, config: dict) -> "Run":
        """The run of this configuration in `path`, by default in results/runs/interactive/ under a name of its own.

        A run of another configuration that lies there is kept: it is renamed to NAME~HASH.
        """
        identity = config_hash(config)
        if not path:
            name = f"{config['data']['dataset']}-{config['method']['name']}-seed{config['seed']}-{identity}"
            path = results_dir() / "runs" / "interactive" / name
        path = Path(path)
        if (path / "config.json").exists() and (other := config_hash(read_config(path / "config.json"))) != identity:
            aside = path.with_name(f"{path.name}~{other}")
            while aside.exists():  # that configuration was set aside here before
                aside = aside.with_name(f"{aside.name}~")
            path.rename(aside)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists():
            write_json(path / "config.json", config)
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while training: of two processes that want one run, the second waits. Released when its holder dies."""
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            print(f"waiting for another process that trains this run: {self.path.name}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @property
    def is_finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def metrics(self) -> dict:
        """`best` and `last`: epoch, validation and test metrics; `seconds` of training, `parameters` of the student.

        `last` has the accuracy on the training images, without augmentation, too.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        if not self.is_finished:
            raise FileNotFoundError(f"the run {self.path} is not finished: start it again, it goes on from its last epoch")
        return json.loads((self.path / "metrics.json").read_text())

    @property
    def job(self) -> dict:
        """`plan`, `arm` and `replicate`; of a run without job.json, the arm is its folder's name without seed and fold."""
        if (self.path / "job.json").exists():
            return json.loads((self.path / "job.json").read_text())
        return {"arm": self.path.name.rsplit("-seed", 1)[0], "replicate": {}}

    @property
    def environment(self) -> dict:
        return json.loads((self.path / "environment.json").read_text())

    @property
    def history(self) -> pd.DataFrame:
        return pd.read_csv(self.path / "history.csv")

    @property
    def predictions(self) -> pd.DataFrame:
        """Test part: id, label and one column of probabilities per class, by the weights of the best validation epoch."""
        return pd.read_csv(self.path / "predictions.csv", dtype={"id": str})

    @property
    def settings(self) -> dict:
        """What can be varied, flat: the method and its arguments, the student's options, the recipe; `teacher_...` is what the
        teacher does not share with the student. What a run of an older version does not name had its default."""
        method = dict(self.config["method"])
        student, teacher = dict(method.pop("student")), method.pop("teacher", {})
        method.pop("teacher_weights", None)
        name = method.pop("name")
        defaults = {field.name: field.default for field in fields(Recipe)}
        defaults |= {key: p.default for key, p in inspect.signature(getattr(methods, name)).parameters.items()}
        known = {
            key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items() if v not in (MISSING, Parameter.empty)
        }
        own = {f"teacher_{key}": value for key, value in teacher.items() if student.get(key) != value}
        return {**known, "method": name, "network": student.pop("name"), **self.config["recipe"], **method, **student, **own}

    def student(self, which: str = "best") -> nn.Module:
        """The trained network in eval mode, with the weights of the "best" validation epoch or of the "last".

        It remembers the images that it has seen (`trained_on`), so that it cannot teach where they are test images.
        """
        creation = self.config["method"]["student"]
        model = models.create(**{key: value for key, value in creation.items() if key != "pretrained"})
        split = pd.read_csv(self.path / "split.csv", dtype={"id": str})
        model.trained_on = self.config["data"] | {
            "ids": set(split.id[split.part != "test"]),
            "protocol_of_training": self.config["recipe"].get("protocol", "honest"),
        }
        return models.load_weights(model, self.path / f"{which}.safetensors").eval()


def load(folder: str | Path) -> pd.DataFrame:
    """One row per finished run in `folder` (searched two levels deep): its configuration and metrics in flat columns.

    `attrs["questions_changed_after"]` is how many runs were finished when the plan's questions changed, if they did.

    Networks trained alone come first, then by name. Columns: run (the arm, with the fraction of the training part if that is
    not 1), kind, path, method, student, dataset, image_size, protocol, fold, fraction, seed, epochs, epoch, parameters,
    seconds, images_per_second, selection (the part that chose the epoch), precision, device, and the test metrics of the chosen
    epoch (`last_...` those of the last epoch).

    Raises:
        FileNotFoundError: no finished run is there.
    """
    folder = Path(folder)
    found = sorted(f.parent for pattern in ("metrics.json", "*/metrics.json", "*/*/metrics.json") for f in folder.glob(pattern))
    rows = []
    for run in (Run(path) for path in found if "~" not in path.name):
        config, metrics, kind = run.config, run.metrics, run.job["arm"]
        rows.append(
            {
                "run": kind + (f" {config['data']['fraction']:.0%}" if config["data"]["fraction"] < 1 else ""),
                "kind": kind,
                "path": str(run.path),
                "method": config["method"]["name"],
                "student": config["method"]["student"]["name"],
                **{key: config["data"][key] for key in ("dataset", "image_size", "protocol", "fold", "fraction")},
                **({"draw": config["data"]["draw"]} if "draw" in config["data"] else {}),
                "seed": config["seed"],
                "epochs": config["recipe"]["epochs"],
                "epoch": metrics["best"]["epoch"],
                **{key: metrics[key] for key in ("parameters", "seconds", "images_per_second")},
                "selection": "test" if config["recipe"].get("protocol") == "paper" else "validation",
                "precision": config["precision"],
                "device": run.environment["device"],
                **{key: value for key, value in metrics["best"]["test"].items() if key != "confusion"},
                **{f"last_{key}": value for key, value in metrics["last"]["test"].items() if key != "confusion"},
            }
        )
    if not rows:
        raise FileNotFoundError(f"no finished run in {folder}; run a plan first: make study PLAN=smoke")
    table = pd.DataFrame(rows)
    plans = {path for run in found for path in (run.parent / "plan.json", run.parents[1] / "plan.json") if path.exists()}
    for path in plans:
        table.attrs |= {key: value for key, value in json.loads(path.read_text()).items() if key == "questions_changed_after"}
    return table.sort_values(
        ["method", "kind", "fraction", "seed", "fold"],
        key=lambda c: c != "Supervised" if c.name == "method" else c,
        ignore_index=True,
    )


def environment(device: torch.device) -> dict:
    """Where a run happens: versions, hardware, threads, the commit of the study and the time (UTC)."""

    def git(*arguments: str) -> str | None:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", "hdkd_lib", "notebooks")),
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
