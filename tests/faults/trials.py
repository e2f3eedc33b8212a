"""Runs that are killed and damaged at random must end as undisturbed ones do, to the bit.

    python tests/faults/trials.py --seed 0 --trials 200             # about 10 minutes of one core: 0.8 s a start
    python tests/faults/trials.py --seed 0 --trials 5 --workflow    # about as long, most of it the start of kernels

A trial trains a teacher and then its student in an empty folder. It is started several times. Most starts are killed: by a
signal at some moment, or by SIGKILL just before one of the operations on files (open, rename, remove) that a start consists of.
Between two starts files are cut, emptied, removed or changed by one bit, those of the cache of decoded images too, and such
leavings as killed processes have are planted. Then:

- a start that is not killed succeeds, whatever was done before;
- the last one leaves the weights, predictions, split, history and metrics of the undisturbed run, but for seconds;
- nothing half-written is left, and what was set aside has been said.

With `--workflow` the runs are those of a plan, and what is killed is make, the driver, a job or a kernel; ten seconds after a
signal to the driver no process of the plan may be left.
"""  # fmt: skip

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
EXECUTION = {"device": "cpu", "precision": "float32", "checkpoint_seconds": 0.05, "force": True}
NETWORK = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
FILES = ("best.safetensors", "last.safetensors", "ema.safetensors", "config.json", "split.csv")
FILES += ("predictions.csv", "predictions_last.csv", "predictions_ema.csv")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PLAN = """
parameters: {dataset: digits, image_size: 16, fraction: 0.1, recipe: {name: nano, epochs: 8, ema: 0.8}}
replicates: [{seed: 0}]
epoch: last
runs:
  teacher: {network: hdkd_teacher_nano}
  hdkd: {network: hdkd_student_distilled_nano, method: HDKD, teacher: teacher}
reports: []
"""


def train(folder: Path) -> None:
    """What each start of a trial does."""
    from hdkd_lib.data import load
    from hdkd_lib.experiment import build
    from hdkd_lib.recipes import Recipe

    data = load("digits", image_size=16, fraction=0.06)
    recipe = Recipe(epochs=3, batch_size=16, optimizer="adamw", lr=2e-3, augment="hdkd", mixup=0.2, ema=0.8)
    network = {"network": "deit_tiny_distilled_patch16_224", "network_options": NETWORK, "recipe": recipe}
    teacher = build(data, **network).run(folder / "teacher", **EXECUTION)
    build(data, **network, method="DeiT", teacher=teacher, seed=1).run(folder / "student", **EXECUTION)


def start(root: Path, kill: Callable[[int], None] | None = None, operation: int = -1) -> tuple[int, str, int]:
    """Trains in a process of its own; its exit code, negative for a signal, what it printed, and its operations on files.

    Args:
        kill: is called with the number of the process, to kill it.
        operation: before which the process kills itself.
    """
    log, count = root / "log.txt", root / "count.txt"
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.environ["HDKD_CACHE"] = str(root / "cache")
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            number, own = 0, (str(root / "runs"), str(root / "cache"))

            def watch(event: str, arguments: tuple) -> None:
                nonlocal number
                if event in ("open", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(own):
                    if number == operation:
                        os.kill(os.getpid(), signal.SIGKILL)
                    number += 1

            sys.addaudithook(watch)
            train(root / "runs")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            count.write_text(str(number))
            os._exit(code)
    if kill:
        kill(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, log.read_text(), int(count.read_text()) if code >= 0 else 0


def start_workflow(root: Path, victim: str = "", signal_number: int = 0, seconds: float = 0.0) -> tuple[int, str]:
    """Starts the plan by make, and sends a signal to a process that then is there; exit code and what was printed.

    Raises:
        AssertionError: 10 seconds after a signal to the driver a process of the plan still runs.
    """
    own = {"HDKD_RESULTS": str(root / "results"), "HDKD_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT)}
    with (root / "log.txt").open("w") as log:
        made = subprocess.Popen(["make", "-s"], cwd=root, stdout=log, stderr=log, env=os.environ | own, start_new_session=True)
    words = {"make": "make -s", "driver": "study.py run", "job": "study.py execute", "kernel": "ipykernel_launcher"}

    def family() -> list[psutil.Process]:
        """What the plan's processes are, those whose parent is gone too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("HDKD_RESULTS") == own["HDKD_RESULTS"]:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                continue
        return found

    if victim:
        until = time.monotonic() + 600
        while made.poll() is None and time.monotonic() < until:
            found = [process for process in family() if words[victim] in " ".join(process.cmdline())]
            if found:
                time.sleep(seconds)
                for process in found[:1]:
                    if process.is_running():
                        process.send_signal(signal_number)
                break
            time.sleep(0.2)
        if victim == "driver":
            sent = time.monotonic()
            while left := family():
                assert time.monotonic() - sent < 10, f"after 10 s there are still {[' '.join(p.cmdline()) for p in left]}"
                time.sleep(0.1)
            print(f"    all ended after {time.monotonic() - sent:.1f} s")
    code = made.wait()
    while family():  # a driver whose make was killed goes on to the end
        time.sleep(0.5)
    return code, (root / "log.txt").read_text()


def damage(root: Path, draw: random.Random) -> str:
    """Does something to one file; what, in words."""
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and "~" not in str(f) and not f.name.endswith((".lock", ".txt"))]
    files = [f for f in files if f.parts[len(root.parts)] in ("runs", "results", "cache") and ".snakemake" not in f.parts]
    if not files:
        return "nothing to damage"
    file, how = draw.choice(files), draw.choice(["cut", "empty", "bit", "bit", "gone"])
    content = bytearray(file.read_bytes())
    if how == "gone" and file.suffix in (".safetensors", ".crc32"):  # not known to be missing: older ones have none
        how = "empty"
    if how == "gone":
        file.unlink()
    elif how == "bit" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    return f"{how} {file.relative_to(root)}"


def plant(root: Path, draw: random.Random) -> str:
    """What a killed process leaves behind, at some place."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    folders = [f.parent for f in sorted(root.rglob("config.json")) if "~" not in str(f)]
    if folders and draw.random() < 0.5:
        path = draw.choice(folders) / f".{draw.choice(['checkpoint.pt', 'history.csv', 'metrics.json'])}.{dead.pid}"
        path.write_bytes(b"half")
    else:
        path = root / "cache" / f".building-{socket.gethostname()}-{dead.pid}-abcd"
        path.mkdir(parents=True, exist_ok=True)
        (path / "images.uint8").write_bytes(b"half")
    return f"planted {path.relative_to(root)}"


def differences(runs: Path, undisturbed: Path, said: str) -> list[str]:
    """What distinguishes the ends of runs from the undisturbed ones, and what should not be there."""
    found = []
    for expected in (path for path in sorted(undisturbed.iterdir()) if (path / "config.json").exists()):
        own = runs / expected.name
        for name in FILES:
            if not (own / name).exists() or (own / name).read_bytes() != (expected / name).read_bytes():
                found.append(f"{expected.name}/{name} is another")
        histories = [pd.read_csv(path / "history.csv").drop(columns="seconds") for path in (own, expected)]
        if not histories[0].equals(histories[1]):
            found.append(f"{expected.name}/history.csv is another")
        measured = [json.loads((path / "metrics.json").read_text()) for path in (own, expected)]
        for each in measured:
            del each["seconds"], each["images_per_second"]
        if measured[0] != measured[1]:
            found.append(f"{expected.name}/metrics.json is another")
    for path in [*runs.rglob("*"), *(runs.parent / "cache").rglob("*")]:
        if "~" in str(path.parent):  # a run set aside keeps its checkpoint
            continue
        if re.fullmatch(r"\.building-.*|\..+\.\d+|checkpoint[^~]*", path.name):
            found.append(f"{path.name} was left")
        if path.name.endswith("~damaged") and f"{path.name.removesuffix('~damaged')} is damaged" not in said:
            found.append(f"nothing said that {path.name} was set aside")
    return found


def trial(root: Path, undisturbed: Path, draw: random.Random, seconds: float, operations: int) -> tuple[list[str], list[str]]:
    """What was done, and what is wrong with it."""
    done, said, wrong = [], "", []
    for _ in range(draw.randint(1, 4)):
        way = draw.choice(["moment", "operation", "operation", "whole"])
        if way == "moment":
            after, number = draw.uniform(0, seconds), draw.choice(SIGNALS)

            def kill(process: int, after: float = after, number: int = number) -> None:
                time.sleep(after)
                os.kill(process, number)

            code, log, _ = start(root, kill)
            done.append(f"{signal.Signals(number).name} after {after:.2f} s")
        else:
            at = draw.randrange(operations) if way == "operation" else -1
            code, log, _ = start(root, operation=at)
            done.append(f"SIGKILL before operation {at}" if at >= 0 else "a whole start")
        said += log
        if code > 0 and "KeyboardInterrupt" not in log:
            wrong.append(f"failed after {done}:\n{log[-2000:]}")
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            done.append(damage(root, draw))
        if draw.random() < 0.3:
            done.append(plant(root, draw))
    code, log, _ = start(root)
    if code:
        return done, [*wrong, f"the last start failed:\n{log[-2000:]}"]
    return done, wrong + differences(root / "runs", undisturbed, said + log)


def prepare_workflow(root: Path) -> None:
    """A copy of the study with one plan, and a Makefile as the study's."""
    (root / "notebooks" / "plans").mkdir(parents=True)
    (root / "notebooks" / "plans" / "tiny.yaml").write_text(PLAN)
    for file in ("study.py", "Snakefile", "notebooks/run.ipynb"):
        shutil.copyfile(ROOT / file, root / file)
    (root / "Makefile").write_text(f"study:\n\t@{sys.executable} study.py run tiny --cores 2\n")


def workflow_trial(root: Path, undisturbed: Path, draw: random.Random) -> tuple[list[str], list[str]]:
    prepare_workflow(root)
    done, said = [], ""
    for _ in range(draw.randint(1, 2)):
        victim = draw.choice(["make", "driver", "driver", "job", "kernel"])
        number, after = draw.choice(SIGNALS), draw.choice([draw.uniform(0, 5), draw.uniform(5, 30)])
        said += start_workflow(root, victim, number, after)[1]
        done.append(f"{signal.Signals(number).name} to {victim} after {after:.1f} s")
        done += [damage(root, draw) for _ in range(draw.randint(0, 2))] + [plant(root, draw) for _ in range(draw.randint(0, 1))]
    code, log = start_workflow(root)
    if code:
        return done, [f"the last start failed:\n{log[-3000:]}"]
    return done, differences(root / "results" / "runs" / "tiny", undisturbed, said + log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial, to repeat one")
    parser.add_argument("--workflow", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in a shell's background ignores it
    begun, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "undisturbed"
        whole.mkdir()
        if arguments.workflow:
            prepare_workflow(whole)
            code, log = start_workflow(whole)
            undisturbed = whole / "results" / "runs" / "tiny"
        else:
            import torch

            torch.set_num_threads(1)
            os.environ["HDKD_CACHE"] = str(whole / "cache")
            train(whole / "warm")  # so that a start is a fork, which need not import and compile again
            time_of_one = time.monotonic()
            code, log, operations = start(whole)
            time_of_one = time.monotonic() - time_of_one
            undisturbed = whole / "runs"
            print(f"a start takes {time_of_one:.1f} s and has {operations} operations on files", flush=True)
        assert code == 0, log
        for number in range(arguments.first, arguments.first + arguments.trials):
            draw, root = random.Random(f"{arguments.seed} {number}"), Path(folder) / str(number)
            root.mkdir()
            if arguments.workflow:
                done, wrong = workflow_trial(root, undisturbed, draw)
            else:
                if draw.random() < 0.7:
                    shutil.copytree(whole / "cache", root / "cache")
                done, wrong = trial(root, undisturbed, draw, 1.1 * time_of_one, operations)
            print(f"{number}: {'; '.join(done)}", *(f"  WRONG: {each}" for each in wrong), sep="\n", flush=True)
            failed += bool(wrong)
            shutil.rmtree(root)
    print(f"{arguments.trials} trials, {failed} wrong, {(time.monotonic() - begun) / 60:.0f} minutes")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
