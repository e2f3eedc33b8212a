"""A real SLURM of one node runs a plan, one of its jobs killed by its time limit."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import study

NODE = Path(__file__).with_name("single_node.sh")
PLAN = """
parameters: {dataset: digits, image_size: 16, fraction: 0.05, device: cpu, recipe: {name: nano, epochs: 150}}
replicates: [{seed: 0}]
runs:
  teacher: {network: hdkd_teacher_nano}
  hdkd: {network: hdkd_student_distilled_nano, method: HDKD, teacher: teacher, recipe: {epochs: 3}}
reports: [09_tables]
"""
PROFILE = {"runtime: 1440": "runtime: 60", "mem_mb: 16000": "mem_mb: 4000", "# slurm-status-command": "slurm-status-command"}
OFTEN = "slurm-init-seconds-before-status-checks: 3\nseconds-between-status-checks: 3\n"


@pytest.fixture
def slurm():
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the extra `slurm` is not installed")
    started = subprocess.run([NODE, "start"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    yield
    subprocess.run([NODE, "stop"], check=True)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the study with the plan `tiny`, and a profile of this node."""
    for file in ("study.py", "Snakefile", "notebooks", "profiles"):
        source = study.ROOT / file
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / file)
    (tmp_path / "notebooks" / "plans" / "tiny.yaml").write_text(PLAN)
    profile = tmp_path / "profiles" / "slurm" / "profile.yaml"
    text = profile.read_text()
    for general, own in PROFILE.items():
        assert general in text
        text = text.replace(general, own)
    profile.write_text(text + OFTEN)
    monkeypatch.setenv("PYTHONPATH", str(study.ROOT))
    return tmp_path


@pytest.mark.slow
def test_a_run_killed_by_its_time_limit_goes_on_and_ends_as_one_that_was_not_killed(slurm, copy, monkeypatch):
    command = [sys.executable, "study.py", "run", "tiny", "--cores", "2"]
    monkeypatch.setenv("HDKD_RESULTS", str(copy / "slurm"))
    log, teacher = copy / "log", copy / "slurm" / "runs" / "tiny" / "teacher-seed0"
    with log.open("w") as file:
        workflow = subprocess.Popen([*command, "--profile", "profiles/slurm"], cwd=copy, stdout=file, stderr=file)
    try:
        _wait(lambda: (teacher / "history.csv").exists() or workflow.poll() is not None, 900, log)
        [kernel] = _kernels("teacher-seed0")
        kernel.suspend()  # its limit will end it in the middle, however fast this machine is
        before, job = (teacher / "history.csv").read_text(), kernel.environ()["SLURM_JOB_ID"]
        estimate = json.loads((teacher.parent / "prepared.json").read_text())["seconds"]["teacher-seed0"]
        assert f"TimeLimit=00:{int(10 + 3 * estimate / 60)}:00" in _job(job)
        subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"], check=True)
        _wait(lambda: "JobState=TIMEOUT" in _job(job), 240, log)
        kernel.resume()  # a stopped process hears no signal, and SLURM drains a node whose processes do not end
        kernel.wait(30)
        assert not (teacher / "metrics.json").exists()
        workflow.wait(1800)
    finally:
        workflow.kill()  # what it left in SLURM ends with SLURM
    assert workflow.returncode == 0, log.read_text()
    assert "| " in log.read_text()  # the table
    assert before.count("\n") < 100
    assert (teacher / "history.csv").read_text().startswith(before)  # with the seconds of each epoch: it went on

    monkeypatch.setenv("HDKD_RESULTS", str(copy / "here"))
    subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
    for run, epochs in {"teacher-seed0": 150, "hdkd-seed0": 3}.items():
        files = (copy / place / "runs" / "tiny" / run / "metrics.json" for place in ("slurm", "here"))
        on_slurm, here = (json.loads(file.read_text()) for file in files)
        assert on_slurm["last"]["epoch"] == epochs - 1
        for measured in ("best", "last", "images", "parameters"):
            assert on_slurm[measured] == here[measured]


def _kernels(run: str) -> list[psutil.Process]:
    """The kernels of a run's job."""
    of = [process for process in psutil.process_iter() if process.name() != "srun" and run in process.cmdline()]
    return [child for process in of for child in process.children() if "ipykernel_launcher" in child.cmdline()]


def _job(number: str) -> str:
    return subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout


def _wait(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
