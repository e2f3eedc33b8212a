"""The batch driver: plans, their checks, and what happens when a run fails or is killed."""

import importlib.util
import itertools
import json
import lzma
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import nbformat
import pandas as pd
import pytest
import timm
import torch

import study
from hdkd_lib import runs, statistics, tables

TINY = """
parameters: {dataset: digits, image_size: 16, fraction: 0.05, recipe: {name: nano, epochs: 1}}
replicates: [{seed: 0}]
runs:
  teacher: {network: hdkd_teacher_nano}
  student: {network: hdkd_student_nano}
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A function that writes a plan beside copies of the notebooks; results go to a temporary folder."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (notebooks / "plans").mkdir()
    for notebook in study.NOTEBOOKS.glob("*.ipynb"):
        (notebooks / notebook.name).write_bytes(notebook.read_bytes())
    monkeypatch.setattr(study, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")

    def write(content: str, name: str = "tiny") -> str:
        (notebooks / "plans" / f"{name}.yaml").write_text(content)
        return name

    return write


@pytest.mark.parametrize("path", sorted((study.NOTEBOOKS / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_expands_and_names_only_parameters_that_its_notebooks_have(path):
    expanded = study.expand(path.stem)
    names = expanded["jobs"].keys()
    assert all(needed in names for job in expanded["jobs"].values() for needed in job["needs"])
    assert {job["report"] for job in expanded["jobs"].values()} == {True, False}


def test_a_run_gets_the_teacher_of_its_own_replicate():
    jobs = study.expand("brain_tumor_nano")["jobs"]
    hdkd = jobs["hdkd-seed2-fold2"]
    assert hdkd["needs"] == ["teacher-seed2-fold2"]
    folder = Path("plan")
    own, teachers = (study.paths(name, jobs[name], folder) for name in ("hdkd-seed2-fold2", "teacher-seed2-fold2"))
    of_teacher = {"epoch": "best", "run_dir": teachers["run_dir"]}
    assert own == {"run_dir": str(folder / "hdkd-seed2-fold2"), "teacher": of_teacher}
    assert (hdkd["parameters"]["seed"], hdkd["parameters"]["fold"]) == (2, 2)


def test_a_chapter_gets_the_folder_of_its_teacher():
    jobs = study.expand("smoke")["jobs"]
    assert (jobs["hdkd-seed1"]["notebook"], jobs["hdkd-seed1"]["needs"]) == ("04_hdkd", ["teacher-seed1"])
    own = study.paths("hdkd-seed1", jobs["hdkd-seed1"], Path("plan"))
    assert own == {"run_dir": str(Path("plan") / "hdkd-seed1"), "teacher_dir": str(Path("plan") / "teacher-seed1")}


def test_a_pretrained_network_can_teach(plan):
    content = TINY + "  deit: {network: resnet10t, method: DeiT, teacher: {network: resnet18}}"
    job = study.expand(plan(content))["jobs"]["deit-seed0"]
    assert (job["needs"], job["parameters"]["teacher"]) == ([], {"network": "resnet18"})
    assert "teacher" in study.paths("deit-seed0", job, Path("plan")) | job["parameters"]


def test_plans_are_read_as_yaml_1_2(plan):
    jobs = study.expand(plan(TINY.replace("epochs: 1}", "lr: 1e-3}, protocol: no")))["jobs"]
    assert jobs["student-seed0"]["parameters"]["recipe"]["lr"] == 1e-3
    assert jobs["student-seed0"]["parameters"]["protocol"] == "no"


def test_a_plan_that_extends_another_differs_in_what_it_says_alone(plan):
    plan(TINY, "base")
    larger = "extends: base\nparameters: {image_size: 64}\nthreads: 2\nruns: {resnet: {network: resnet10t}}\n"
    larger += "reports: {09_tables: {features: resnet18}}"
    base, own = study.expand("base"), study.expand(plan(larger))
    assert own["threads"] == 2
    assert own["jobs"].keys() == {"teacher-seed0", "student-seed0", "resnet-seed0", "tables"}
    assert own["jobs"]["tables"]["parameters"] == {"features": "resnet18"}
    student = base["jobs"]["student-seed0"]["parameters"]
    assert own["jobs"]["student-seed0"]["parameters"] == student | {"image_size": 64}
    assert own["jobs"]["resnet-seed0"]["parameters"]["network"] == "resnet10t"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fraction: 0.05", "fractoin: 0.05"), "unknown parameter of run.ipynb .*'fractoin'; did you mean 'fraction'"),
        (("image_size: 16", "image_size: '16'"), r"image_size of run teacher-seed0 must be a whole number \(got '16'\)"),
        (("recipe: {name: nano, epochs: 1}", "recipe: nano"), r"recipe of run teacher-seed0 must be a dict \(got 'nano'\)"),
        (("epochs: 1", "epochs: '1'"), r"arm teacher in tiny.yaml: epochs must be a whole number \(got '1'\)"),
        (("{network: hdkd_t", "{notebook: 02_techer, network: hdkd_t"), "unknown notebook .* did you mean '02_teacher'"),
        (("{network: hdkd_s", "{synthesis: {per_clas: 3}, network: hdkd_s"), "an inversion has no setting 'per_clas'"),
        (("runs:", "run:"), "unknown key in tiny.yaml 'run'; did you mean 'runs'"),
        (("{network: hdkd_s", "{teacher: techer, network: hdkd_s"), "unknown teacher of run student .* did you mean 'teacher'"),
        (("runs:", "epoch: last\nruns:\n  hdkd: {notebook: 04_hdkd, teacher: teacher}"), "teaches by its best epoch"),
        (("replicates: [{seed: 0}]", ""), "tiny.yaml needs `replicates`"),
        (("[{seed: 0}]", "[{seed: 0}, {seed: 0}]"), "the replicate {'seed': 0} is in tiny.yaml twice"),
        (("{network: hdkd_student_nano}", ""), "tiny.yaml needs `runs`"),
        ((TINY, "# nothing yet"), "tiny.yaml holds no keys"),
    ],
)
def test_a_mistake_in_a_plan_is_refused_before_anything_runs(plan, change, message):
    with pytest.raises(ValueError, match=message):
        study.run(plan(TINY.replace(*change)), cores=1)


def test_an_unknown_plan_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown plan 'smok'; did you mean 'smoke'"):
        study.expand("smok")


def test_runs_whose_parameters_changed_are_set_aside_and_others_stay(plan, tmp_path):
    before = study.expand(plan(TINY))
    folder = tmp_path / "results" / "runs" / "tiny"
    for name in before["jobs"]:
        (folder / name).mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(before))
    study._set_aside_changed(folder / "jobs.json", study.expand(plan(TINY.replace("hdkd_student_nano", "hdkd_student"))))
    assert (folder / "student-seed0~before").is_dir()
    assert not (folder / "student-seed0").exists()
    assert (folder / "teacher-seed0").is_dir()


def test_publishing_an_unfinished_plan_names_what_is_missing(plan):
    with pytest.raises(FileNotFoundError, match=r"tiny is not finished .teacher-seed0, student-seed0"):
        study.publish(plan(TINY))


@pytest.fixture
def timed(plan, tmp_path, monkeypatch):
    """`timed(seconds)`: prints how long three teachers and three students take on 5 cores, as `seconds` estimates each."""
    own = "replicates: [{seed: 0}, {seed: 1}, {seed: 2}]\nthreads: 2\nextends: tiny\n"
    own += "runs: {student: {network: hdkd_student_nano, method: DeiT, teacher: teacher}}"
    plan(TINY)

    def timed(seconds):
        monkeypatch.setattr("hdkd_lib.estimate.seconds", seconds)
        monkeypatch.setattr("torch.set_num_threads", threads.append)
        study._print_times(study.expand(plan(own, "timed")), tmp_path, cores=5)

    threads = []
    yield timed
    assert threads == [2]


def test_a_dry_run_adds_up_the_time_of_what_is_not_finished(timed, tmp_path, capsys):
    (tmp_path / "teacher-seed1").mkdir()
    (tmp_path / "teacher-seed1" / "metrics.json").write_text("{}")
    requests = []
    timed(lambda own, teacher: requests.append((own, teacher)) or (3600 if teacher is None else 600 * (1 + own["seed"])))
    assert capsys.readouterr().out.split("\n")[1:] == [
        "run      to run  time of each, with 2 threads",
        "teacher       2  1.0 h",
        "student       3  10 min to 30 min",
        "in all about 1.5 h on 5 cores, 2 runs side by side",  # (2 * 60 + 10 + 20 + 30) / 2 minutes
        "",
        "",
    ]
    (teacher, none), *_, (student, its_teacher) = requests
    assert len(requests) == 5, "each run that is missing, and no other"
    assert none is None
    assert its_teacher["network"] == teacher["network"] == "hdkd_teacher_nano"
    assert (student["network"], student["method"], student["seed"]) == ("hdkd_student_nano", "DeiT", 2)
    assert (student["protocol"], student["recipe"]) == ("grouped", {"name": "nano", "epochs": 1})  # the first by default


def test_a_dry_run_without_the_data_says_so(timed, capsys):
    def seconds(*_):
        raise FileNotFoundError("no data at /here; set HDKD_DATA")

    timed(seconds)
    assert capsys.readouterr().out.endswith("\nno estimate: no data at /here; set HDKD_DATA\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3540, "59 min"), (3600, "1.0 h"), (5400, "1.5 h")]
)
def test_durations_are_in_the_unit_that_suits_them(seconds, text):
    assert study._duration(seconds) == text


def test_a_dry_run_does_not_wait_for_a_plan_that_runs(plan, monkeypatch):
    def workflow(_):
        assert running.is_locked, "it waited until the plan had ended"
        sys.exit(0)

    monkeypatch.setattr("snakemake.cli.main", workflow)
    for name in ("_end_when_asked", "_print_times"):
        monkeypatch.setattr(study, name, lambda *_: None)
    folder = study.RESULTS / "runs" / plan(ARMS)
    folder.mkdir(parents=True)
    running = filelock.FileLock(folder / ".lock", thread_local=False)
    with running:
        (end := threading.Timer(10, running.release, [True])).start()
        assert study.run("tiny", cores=1, dry_run=True) == 0
        end.cancel()
    assert not (folder / "jobs.json").exists()


@pytest.fixture
def fake(plan, tmp_path, monkeypatch):
    """A plan of two notebooks that write a metrics.json without training; `student` fails until the file FIXED exists."""
    header = 'seed: int = 0\nrun_dir: str = ""'
    write = "import pathlib, json, time\npathlib.Path(run_dir, 'config.json').write_text('{}')\n"
    finish = "pathlib.Path(run_dir, 'metrics.json').write_text('{}')"
    bodies = {
        "02_teacher": write + finish,
        "03_student": write + f"assert pathlib.Path({str(tmp_path / 'FIXED')!r}).exists(), 'broken on purpose'\n" + finish,
    }
    reports = {
        "09_tables": "import pathlib\nfor f in ('summary.csv', 'summary.md'): pathlib.Path(out, f).write_text('table')",
        "10_figures": "import pathlib\npathlib.Path(out, 'comparison.png').write_text('figure')",
    }
    for name, body in {**bodies, **reports}.items():
        parameters = nbformat.v4.new_code_cell(header if name in bodies else 'results: str = ""\nout: str = ""')
        parameters.metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(body)])
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, study.NOTEBOOKS / f"{name}.ipynb")
    plan("replicates: [{seed: 0}]\nruns: {teacher: {notebook: 02_teacher}, student: {notebook: 03_student}}", "fake")
    # Snakemake starts study.py anew, which must find the same notebooks and results.
    monkeypatch.setenv("HDKD_RESULTS", str(tmp_path / "results"))
    for file in ("study.py", "Snakefile"):
        (tmp_path / file).write_bytes((study.ROOT / file).read_bytes())
    return tmp_path


@pytest.mark.slow
def test_a_failed_run_keeps_its_notebook_the_others_go_on_and_the_next_start_runs_only_what_is_missing(fake):
    command = [sys.executable, "study.py", "run", "fake", "--cores", "2"]
    failed = subprocess.run(command, cwd=fake, capture_output=True, text=True)
    folder = fake / "results" / "runs" / "fake"
    assert failed.returncode == 1
    assert "student-seed0 failed" in failed.stderr
    assert "broken on purpose" in (folder / "student-seed0" / "run.ipynb").read_text()
    assert (folder / "teacher-seed0" / "metrics.json").exists()
    assert not (folder / "tables").exists()

    teacher_time = (folder / "teacher-seed0" / "metrics.json").stat().st_mtime_ns
    (fake / "FIXED").touch()
    mended = subprocess.run(command, cwd=fake, capture_output=True, text=True)
    assert mended.returncode == 0, mended.stderr
    assert (folder / "teacher-seed0" / "metrics.json").stat().st_mtime_ns == teacher_time
    assert (folder / "figures" / "comparison.png").exists()
    plan = fake / "notebooks" / "plans" / "fake.yaml"
    plan.write_text(plan.read_text().replace("runs: {", "runs: {another: {notebook: 02_teacher}, "))
    extended = subprocess.run(command, cwd=fake, capture_output=True, text=True)
    assert extended.returncode == 0, extended.stderr
    assert (folder / "another-seed0" / "metrics.json").exists()  # a table that is there does not stand for it
    published = subprocess.run([sys.executable, "study.py", "publish", "fake"], cwd=fake, capture_output=True, text=True)
    assert published.returncode == 1  # these notebooks write no predictions


@pytest.mark.slow
def test_a_killed_workflow_leaves_no_process_behind_and_can_be_started_again(fake):
    notebook = nbformat.read(fake / "notebooks" / "02_teacher.ipynb", 4)
    source = notebook.cells[1].source
    note = "import os, pathlib, signal, time\n"  # the kernel notes its number, and when it is asked to end
    note += f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(fake / 'ASKED')!r}).touch())\n"
    note += f"pathlib.Path({str(fake / 'PID')!r}).write_text(str(os.getpid()))\n"
    notebook.cells[1].source = note + "for _ in range(600): time.sleep(1)"
    nbformat.write(notebook, fake / "notebooks" / "02_teacher.ipynb")
    (fake / "FIXED").touch()
    command = [sys.executable, "study.py", "run", "fake", "--cores", "2"]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        started = subprocess.Popen(
            command, cwd=fake, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait(lambda: (fake / "PID").exists() and (fake / "PID").read_text(), 300)
        kernel, sent = int((fake / "PID").read_text()), time.monotonic()
        os.kill(started.pid, number)
        started.wait()
        _wait(lambda kernel=kernel: not _is_running(kernel), 10 - (time.monotonic() - sent))
        assert (fake / "ASKED").exists(), f"it could have kept its state ({number})"
        (fake / "PID").unlink()
        (fake / "ASKED").unlink()

    notebook.cells[1].source = source
    nbformat.write(notebook, fake / "notebooks" / "02_teacher.ipynb")
    again = subprocess.run(command, cwd=fake, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


def _wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def _is_running(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# Clusters and GPUs


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, r"no profile .*/profile.yaml; known: profiles/slurm$"),
        ("executor: nothing", "needs snakemake-executor-plugin-nothing, which is not installed: .* -m pip install"),
        ("executor: slurm", "there is no SLURM here"),
        ("default-resources: {runtime: 1d}", r"runtime in .* must be a whole number of minutes \(got '1d'\)"),
    ],
)
def test_a_wrong_profile_is_refused_before_anything_runs(plan, tmp_path, monkeypatch, profile, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: name.endswith("slurm") or find_spec(name, *args))
    monkeypatch.setattr("shutil.which", lambda program: None)
    (tmp_path / "profile").mkdir()
    if profile:
        (tmp_path / "profile" / "profile.yaml").write_text(profile)
    with pytest.raises(ValueError, match=message):
        study.run(plan(TINY), cores=1, profile=tmp_path / "profile")


def test_a_cluster_loads_each_data_set_once_and_estimates_what_is_missing(plan, tmp_path, monkeypatch):
    content = "parameters: {dataset: digits, image_size: 16}\nreplicates: [{seed: 0}, {seed: 1}]\nruns:\n"
    content += "  teacher: {network: hdkd_teacher_nano, recipe: {name: nano, epochs: 1}}\n"
    content += "  student: {like: teacher, recipe: {epochs: 2}}\n  chapter: {notebook: 03_student, image_size: 32}\n"
    loaded = []
    monkeypatch.setattr(study, "_end_with_parent", lambda: None)
    monkeypatch.setattr("hdkd_lib.data.load", lambda name, **options: loaded.append((name, options["image_size"])))
    monkeypatch.setattr("hdkd_lib.estimate.seconds", lambda own, teacher: own["recipe"]["epochs"])
    (tmp_path / "jobs.json").write_text(json.dumps(study.expand(plan(content))))
    (tmp_path / "teacher-seed0").mkdir()
    (tmp_path / "teacher-seed0" / "metrics.json").write_text("{}")
    study.prepare(tmp_path / "jobs.json")
    prepared = json.loads((tmp_path / "prepared.json").read_text())
    assert loaded == [("digits", 16), ("digits", 32)]
    assert prepared["seconds"] == {"teacher-seed1": 1, "student-seed0": 2, "student-seed1": 2}
    assert prepared["mem_mb"] > 100  # this process holds torch


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A machine with two GPUs, as far as study.py can tell; locks are kept apart from those of real runs."""
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-a)\n  MIG 1g Device 0: (UUID: MIG-b)\nGPU 1: NVIDIA H100 (UUID: GPU-c)"
    program = tmp_path / "programs" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(program.parent))
    monkeypatch.setattr("tempfile.tempdir", None)  # read anew
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


RUN = {"report": False, "parameters": {}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 3}, r"^GPUS=3, but this machine has 2 GPUs \(nvidia-smi -L\); leave GPUS out to use all$"),
        ({"gpus": 0}, "^GPUS=0, but this machine has 2 GPUs"),
        ({"runs_per_gpu": 0}, r"RUNS_PER_GPU must be at least 1 \(got 0\)"),
        ({"gpus": 2, "profile": "profiles/slurm"}, "on a cluster say gpu: 1 in the profile"),
        ({"content": TINY.replace("{network: hdkd_s", "{num_processes: 3, network: hdkd_s")}, "student-seed0 has 3 processes"),
    ],
)
def test_more_than_the_gpus_that_there_are_is_refused_before_anything_runs(plan, two_gpus, monkeypatch, arguments, message):
    monkeypatch.setattr(study, "_cluster", lambda profile: {})
    with pytest.raises(ValueError, match=message):
        study.run(plan(arguments.pop("content", TINY)), cores=1, **arguments)


def test_runs_take_slots_on_the_gpus_that_this_process_may_use(two_gpus, monkeypatch):
    on_cpu, in_two, report = ({"parameters": p} for p in ({"device": "cpu"}, {"num_processes": 2}, {}))
    jobs = {"run": RUN, "on_cpu": RUN | on_cpu, "in_two": RUN | in_two, "report": report | {"report": True}}
    assert study._slots(None, 1, jobs) == {"gpus": ["0", "1"], "runs_per_gpu": 1, "slots": {"run": 1, "in_two": 2}}
    assert study._slots(1, 1, {"run": RUN})["gpus"] == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-d")
    assert study._slots(None, 1, {"run": RUN})["gpus"] == ["3", "GPU-d"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert study._slots(None, 1, jobs) == {"gpus": [], "runs_per_gpu": 1, "slots": {}}
    with pytest.raises(ValueError, match=r"GPUS=1, but this machine has 0 GPUs \(CUDA_VISIBLE_DEVICES=\)"):
        study._slots(1, 1, jobs)


HOLD = """
import json, os, sys
import study
print("waits", flush=True)
with study._gpus(json.loads(sys.argv[1]), sys.argv[2]):
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(two_gpus):
    """`hold(run)`: a process that takes what a run needs, two runs to a GPU, and keeps it; it has written one line so far."""
    plan = study._slots(None, 2, {"run": RUN, "in_two": RUN | {"parameters": {"num_processes": 2}}})
    started = []

    def hold(run: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, json.dumps(plan), run]
        started.append(subprocess.Popen(command, cwd=study.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))
        assert started[-1].stdout.readline() == b"waits\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()


def _gets(process: subprocess.Popen, seconds: float) -> str:
    """The GPUs that the process got, or nothing if it waits so long."""
    return process.stdout.readline().decode().strip() if select.select([process.stdout], [], [], seconds)[0] else ""


def test_runs_spread_over_the_gpus_and_wait_for_a_slot_that_a_killed_run_frees(hold):
    runs = []
    for gpu in ("0", "1", "0", "1"):
        runs.append(hold("run"))
        assert _gets(runs[-1], 30) == gpu
    fifth, in_two = hold("run"), hold("in_two")
    assert _gets(fifth, 2) == ""
    runs[1].kill()
    assert _gets(fifth, 30) == "1"
    runs[0].kill()
    assert _gets(in_two, 2) == ""  # there is a slot on one GPU, and none on the other
    sixth = hold("run")
    assert _gets(sixth, 30) == "0"  # who waits for two keeps none
    for run in (sixth, runs[3]):
        run.kill()
    assert _gets(in_two, 30) == "0,1"


@pytest.mark.slow
def test_the_runs_of_a_plan_share_the_gpus(fake, two_gpus):
    notebook = nbformat.read(fake / "notebooks" / "02_teacher.ipynb", 4)
    during = "import os, time\nstart = time.time()\ntime.sleep(2)\n"
    during += "used = [os.environ['CUDA_VISIBLE_DEVICES'], start, time.time()]\n"
    notebook.cells[1].source = during + notebook.cells[1].source.replace("write_text('{}')", "write_text(json.dumps(used))")
    nbformat.write(notebook, fake / "notebooks" / "02_teacher.ipynb")
    content = f"replicates: {[{'seed': seed} for seed in range(6)]}\nruns: {{teacher: {{notebook: 02_teacher}}}}\nreports: []"
    (fake / "notebooks" / "plans" / "fake.yaml").write_text(content)
    command = [sys.executable, "study.py", "run", "fake", "--cores", "6"]
    refused = subprocess.run([*command, "--gpus", "3"], cwd=fake, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: GPUS=3, but this machine has 2 GPUs")
    done = subprocess.run(command, cwd=fake, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = (fake / "results" / "runs" / "fake").glob("*/metrics.json")
    used = sorted(json.loads(file.read_text()) for file in files)
    assert {gpu for gpu, *_ in used} == {"0", "1"}
    for (gpu, _, end), (other, start, _) in itertools.pairwise(used):
        assert gpu != other or end <= start, "two runs at once on one GPU"


# Plans whose arms are parameters of run.ipynb

ARMS = """
parameters: {dataset: digits, image_size: 16, recipe: {name: nano, epochs: 3, mixup: 0}}
replicates: [{draw: 0, seed: 0}, {draw: 1, seed: 1}]
metric: accuracy
epoch: last
smallest_difference: 0.02
questions:
  hdkd: {ask: Does it help?, contrasts: {than no teacher: [hdkd, student]}}
runs:
  teacher: {network: hdkd_teacher_nano, network_options: {stem_stride: 2}}
  student: {network: hdkd_student_distilled_nano, network_options: {stem_stride: 2}}
  again: {like: student, seed: 100}
  long: {like: again, recipe: {epochs: 9}, network_options: {gate: se}}
  hdkd: {like: student, method: HDKD, teacher: teacher, options: {alpha: 0.3}}
  logits: {like: hdkd, options: {stages: []}}
"""


def test_an_arm_that_is_like_another_differs_in_what_it_says(plan):
    jobs = study.expand(plan(ARMS))["jobs"]
    assert {job["notebook"] for job in jobs.values() if not job["report"]} == {"run"}
    student, again, long, hdkd, logits = (
        jobs[f"{arm}-draw1-seed1"]["parameters"] for arm in ("student", "again", "long", "hdkd", "logits")
    )
    assert student["recipe"] == {"name": "nano", "epochs": 3, "mixup": 0}
    assert again == student | {"seed": 101}
    recipe, options = student["recipe"] | {"epochs": 9}, {"stem_stride": 2, "gate": "se"}
    assert long == again | {"recipe": recipe, "network_options": options}
    assert hdkd == student | {"method": "HDKD", "options": {"alpha": 0.3}, "teacher": {"epoch": "last"}}
    assert logits == hdkd | {"options": {"alpha": 0.3, "stages": []}}
    job = jobs["logits-draw1-seed1"]
    assert (job["arm"], job["replicate"], job["needs"]) == ("logits", {"draw": 1, "seed": 1}, ["teacher-draw1-seed1"])
    own = study.paths("logits-draw1-seed1", job, Path("plan"))
    assert own["teacher"] == {"epoch": "last", "run_dir": str(Path("plan") / "teacher-draw1-seed1")}


def test_a_plan_that_extends_another_merges_its_arms_and_questions(plan):
    plan(ARMS, "base")
    own = "extends: base\nparameters: {image_size: 32}\nruns: {logits: {like: hdkd, options: {stages: [3]}}}\n"
    own += "questions: {stages: {ask: Do stages help?, contrasts: {than one: [hdkd, logits]}}}"
    expanded = study.expand(plan(own))
    assert expanded["jobs"]["logits-draw0-seed0"]["parameters"]["options"] == {"alpha": 0.3, "stages": [3]}
    assert expanded["content"]["questions"].keys() == {"hdkd", "stages"}
    assert expanded["content"]["epoch"] == "last"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[hdkd, student]", "[hdkt, student]"), "unknown arm in contrast 'than no teacher' of question hdkd .* mean 'hdkd'"),
        (("[hdkd, student]", "[hdkd, hdkd]"), "contrast 'than no teacher' of question hdkd in tiny.yaml must be two arms"),
        (("[hdkd, student]", "[hdkd, student, long]"), "must be two arms"),
        (("ask: Does", "asks: Does"), "unknown key of question hdkd in tiny.yaml 'asks'; did you mean 'ask'"),
        (("like: again", "like: agian"), "unknown arm that long is like in tiny.yaml 'agian'; did you mean 'again'"),
        (("like: student, seed", "like: long, seed"), "arms of tiny.yaml are like one another in a circle: .*again"),
        (("metric: accuracy", "metric: acuracy"), "unknown metric in tiny.yaml 'acuracy'; did you mean 'accuracy'"),
        (("metric: accuracy\n", ""), "tiny.yaml asks questions, which need metric, too"),
        (("epoch: last", "epoch: first"), "unknown epoch in tiny.yaml 'first'"),
        (("difference: 0.02", "difference: 2"), "smallest_difference in tiny.yaml must be above 0 and at most 1"),
        (("metric: accuracy", "metric: ece"), "unknown metric in tiny.yaml 'ece'"),
        (("epoch: last", "epoch: ema"), "arm teacher in tiny.yaml: the plan's epoch is ema, and its recipe keeps no moving"),
        (("alpha: 0.3", "alhpa: 0.3"), "arm hdkd in tiny.yaml: HDKD has no option 'alhpa'; did you mean 'alpha'"),
        (("method: HDKD", "method: HDKT"), "arm hdkd in tiny.yaml: unknown method 'HDKT'; did you mean 'HDKD'"),
        (
            ("hdkd_teacher_nano", "hdkd_techer_nano"),
            "arm teacher in tiny.yaml: unknown model .*did you mean 'hdkd_teacher_nano'",
        ),
        (("epochs: 3", "epoch: 3"), "arm teacher in tiny.yaml: a recipe has no field 'epoch'; did you mean 'epochs'"),
        (("method: HDKD, teacher: teacher", "method: HDKD"), "arm hdkd in tiny.yaml: HDKD needs a teacher"),
        (("seed: 100", "sed: 100"), "unknown parameter of run.ipynb .*'sed'; did you mean 'seed'"),
        (("teacher: teacher", "teacher: techer"), "unknown teacher of run hdkd in tiny.yaml 'techer'; did you mean 'teacher'"),
    ],
)
def test_a_mistake_in_arms_or_questions_is_refused_before_anything_runs(plan, change, message):
    assert change[0] in ARMS
    with pytest.raises(ValueError, match=message):
        study.run(plan(ARMS.replace(*change)), cores=1)


def test_students_of_a_changed_teacher_are_set_aside_with_it(plan, tmp_path):
    before = study.expand(plan(ARMS))
    folder = tmp_path / "results" / "runs" / "tiny"
    for name in before["jobs"]:
        (folder / name).mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(before))
    after = study.expand(plan(ARMS.replace("{network: hdkd_teacher_nano, ", "{network: hdkd_teacher_nano, fraction: 0.5, ")))
    study._set_aside_changed(folder / "jobs.json", after)
    aside = {path.name.split("-")[0] for path in folder.glob("*~before")}
    assert aside == {"teacher", "hdkd", "logits"}


@pytest.mark.parametrize("content", ["", '{"jobs": {"teach'])
def test_damaged_files_of_a_plan_are_set_aside_and_made_anew(content, plan, tmp_path, capsys):
    expanded = study.expand(plan(ARMS))
    for name in ("jobs.json", "plan.json", "prepared.json"):
        (tmp_path / name).write_text(content)
    finished(tmp_path, "teacher-draw0-seed0", "student-draw0-seed0", "again-draw0-seed0")
    (tmp_path / "student-draw0-seed0" / "metrics.json").write_text(content)
    (tmp_path / "again-draw0-seed0" / "job.json").write_text(content)
    (tmp_path / ".jobs.json.4711").write_text("half")
    study._mend(tmp_path, expanded)
    said = capsys.readouterr().out
    for name in ("jobs", "plan", "prepared", "student-draw0-seed0/metrics", "again-draw0-seed0/job"):
        assert not (tmp_path / f"{name}.json").exists()
        assert (tmp_path / f"{name}.json~damaged").read_text() == content
        assert f"{tmp_path / name}.json is damaged: it was renamed to" in said
    assert not list(tmp_path.glob(".*json*"))
    study._set_aside_changed(tmp_path / "jobs.json", expanded)
    (tmp_path / "teacher-draw0-seed0" / "last.safetensors").touch()  # students need it
    study._take_published(expanded, tmp_path)
    study._note_changed_questions(expanded, tmp_path)
    assert runs.plan(tmp_path)["name"] == "tiny"
    assert {file.parent.name for file in tmp_path.glob("*/metrics.json")} == {"teacher-draw0-seed0", "again-draw0-seed0"}
    assert json.loads((tmp_path / "again-draw0-seed0" / "job.json").read_text())["arm"] == "again"


def test_numbers_as_keys_are_no_change(plan, tmp_path):
    expanded = study.expand(plan(ARMS))
    expanded["jobs"]["hdkd-draw0-seed0"]["parameters"]["options"] = {"taps": {0: 4}}
    (tmp_path / "jobs.json").write_text(json.dumps(expanded))
    finished(tmp_path, "hdkd-draw0-seed0")
    study._set_aside_changed(tmp_path / "jobs.json", expanded)
    assert not list(tmp_path.glob("*~before"))


def test_without_jobs_json_changed_runs_are_known_by_their_own(plan, tmp_path):
    before = study.expand(plan(ARMS))
    finished(tmp_path, "teacher-draw0-seed0", "student-draw0-seed0", "again-draw0-seed0")
    for name in ("teacher-draw0-seed0", "student-draw0-seed0", "again-draw0-seed0"):
        study._write_job(tmp_path / name, "tiny", before["jobs"][name])
    changed = study.expand(plan(ARMS.replace("seed: 100", "seed: 200")))
    study._set_aside_changed(tmp_path / "jobs.json", changed)
    assert {path.name for path in tmp_path.glob("*~before")} == {"again-draw0-seed0~before"}


def test_a_teacher_whose_weights_are_damaged_is_trained_again_if_a_student_needs_it(plan, finished_run, tmp_path, capsys):
    expanded = study.expand(plan(ARMS))
    names = [f"{arm}-draw0-seed0" for arm in ("teacher", "student", "hdkd", "logits")]
    for name in names:
        shutil.copytree(finished_run.path, tmp_path / name)
    (tmp_path / "teacher-draw0-seed0" / "last.safetensors").write_bytes(b"damaged")
    study._mend(tmp_path, expanded)
    study._take_published(expanded, tmp_path)
    assert capsys.readouterr().out == "", "all its students are there"
    (tmp_path / "logits-draw0-seed0" / "metrics.json").unlink()
    study._mend(tmp_path, expanded)
    study._take_published(expanded, tmp_path)
    assert "teacher-draw0-seed0/last.safetensors is damaged: it was renamed" in capsys.readouterr().out
    assert {file.parent.name for file in tmp_path.glob("*/metrics.json")} == {"student-draw0-seed0", "hdkd-draw0-seed0"}


def test_a_run_in_which_another_process_trains_is_left_to_it(plan, tmp_path):
    expanded = study.expand(plan(TINY))
    finished(tmp_path, "teacher-seed0")
    (tmp_path / "teacher-seed0" / "job.json").write_text("")
    with runs.lock(tmp_path / "teacher-seed0"):
        study._mend(tmp_path, expanded)
        assert (tmp_path / "teacher-seed0" / "job.json").exists()
    study._mend(tmp_path, expanded)
    assert not (tmp_path / "teacher-seed0" / "job.json").exists()


def finished(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "metrics.json").write_text("{}")


def test_questions_that_change_after_runs_are_counted(plan, tmp_path):
    expanded = study.expand(plan(ARMS))
    changed = study.expand(plan(ARMS.replace("[hdkd, student]", "[hdkd, logits]")))

    def noted() -> int | None:
        return json.loads((tmp_path / "plan.json").read_text()).get("questions_changed_after")

    study._note_changed_questions(expanded, tmp_path)
    study._note_changed_questions(changed, tmp_path)
    assert noted() is None, "nothing had run"
    finished(tmp_path, "student-draw0-seed0", "hdkd-draw0-seed0")
    study._note_changed_questions(changed, tmp_path)
    assert noted() is None
    study._note_changed_questions(expanded, tmp_path)
    assert noted() == 2
    study._note_changed_questions(expanded, tmp_path)
    assert noted() == 2
    published = tmp_path / "results" / "published" / "tiny"  # elsewhere only this is there
    published.mkdir(parents=True)
    (tmp_path / "plan.json").rename(published / "plan.json")
    study._note_changed_questions(expanded, tmp_path)
    assert noted() == 2


def test_a_dry_run_says_what_each_contrast_can_show(plan, capsys):
    study._print_power(study.expand(plan(ARMS))["content"])
    text = capsys.readouterr().out
    assert "Does it help? n = 2, 1 contrast" in text
    found = statistics.detectable(1.0, 2)
    assert f"hdkd - student (than no teacher): finds {found:.1f} standard deviations" in text
    assert f"2 points if that is at most {2 / found:.1f} points" in text


def test_a_dry_run_of_folds_allows_for_their_common_training_images(plan, capsys):
    replicates = json.dumps([{"fold": fold, "seed": seed} for fold in range(5) for seed in range(2)])
    of_folds = ARMS.replace("[{draw: 0, seed: 0}, {draw: 1, seed: 1}]", replicates)
    study._print_power(study.expand(plan(of_folds))["content"])
    text = capsys.readouterr().out
    assert "Does it help? n = 5 folds, whose training images overlap, 1 contrast" in text
    found = statistics.detectable((1 + 5 * 0.2 / 0.7) ** 0.5, 5)
    assert f"finds {found:.1f} standard deviations" in text


@pytest.fixture
def published(plan, tmp_path, monkeypatch):
    """A plan of which `published(*names)` are packed; the packed form is a stand-in."""
    expanded = study.expand(plan(ARMS))

    def published(*names: str, **parameters):
        packed = {}
        for name in names:
            job = expanded["jobs"][name]
            packed[name] = {"job": {"notebook": job["notebook"], "parameters": job["parameters"] | parameters}}
        folder = tmp_path / "results" / "published" / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.json.xz").write_bytes(lzma.compress(json.dumps(packed).encode()))
        monkeypatch.setattr("hdkd_lib.packing.unpack", lambda _, name, folder: finished(folder.parent, name))
        return expanded

    return published


def test_what_is_published_is_done(published, tmp_path):
    expanded = published(*(f"{arm}-draw0-seed0" for arm in ("teacher", "student", "again", "long", "hdkd", "logits")))
    study._take_published(expanded, tmp_path)
    assert {path.parent.name.split("-")[0] for path in tmp_path.glob("*-draw0-*/metrics.json")} == {
        *("teacher", "student", "again", "long", "hdkd", "logits")
    }
    assert not list(tmp_path.glob("*-draw1-*"))


def test_a_teacher_that_is_still_needed_is_trained_again(published, tmp_path):
    expanded = published("teacher-draw0-seed0", "student-draw0-seed0", "hdkd-draw0-seed0")  # logits is missing
    finished(tmp_path, "teacher-draw0-seed0")  # taken over before, without weights
    study._take_published(expanded, tmp_path)
    done = {path.parent.name for path in tmp_path.glob("*/metrics.json")}
    assert done == {"student-draw0-seed0", "hdkd-draw0-seed0"}
    finished(tmp_path, "teacher-draw0-seed0")
    (tmp_path / "teacher-draw0-seed0" / "last.safetensors").touch()
    study._take_published(expanded, tmp_path)
    assert (tmp_path / "teacher-draw0-seed0" / "metrics.json").exists(), "trained again, it stays"


def test_what_is_published_is_trained_if_asked_for(published, tmp_path, capsys):
    arms = [f"{arm}-draw0-seed0" for arm in ("teacher", "student", "again", "long", "hdkd", "logits")]
    expanded = published(*arms)
    study._take_published(expanded, tmp_path)
    assert (
        "6 runs of tiny are published and count as done; to train them: make study PLAN=tiny ANEW=1" in capsys.readouterr().out
    )
    (tmp_path / "again-draw0-seed0" / "last.safetensors").touch()  # trained here
    study._take_published(expanded, tmp_path, anew=True)
    assert {path.parent.name for path in tmp_path.glob("*/metrics.json")} == {"again-draw0-seed0"}


def test_what_was_published_of_other_parameters_is_not_taken(published, tmp_path):
    study._take_published(published("student-draw0-seed0", image_size=64), tmp_path)
    assert not list(tmp_path.glob("*/metrics.json"))


@pytest.mark.slow
def test_replicates_run_one_after_the_other(fake):
    """Each run notes when it ran: with one core, in the order of replicates, then of arms."""
    notebook = nbformat.read(fake / "notebooks" / "02_teacher.ipynb", 4)
    notebook.cells[
        1
    ].source += f"\nwith open({str(fake / 'ORDER')!r}, 'a') as file: print(pathlib.Path(run_dir).name, file=file)"
    nbformat.write(notebook, fake / "notebooks" / "02_teacher.ipynb")
    runs = ", ".join(f"{arm}: {{notebook: 02_teacher}}" for arm in "bac")
    plan = fake / "notebooks" / "plans" / "order.yaml"
    plan.write_text(f"replicates: [{{seed: 1}}, {{seed: 0}}]\nruns: {{{runs}}}\nreports: []")
    command = [sys.executable, "study.py", "run", "order", "--cores", "1"]
    assert subprocess.run(command, cwd=fake, capture_output=True).returncode == 0
    assert (fake / "ORDER").read_text().split() == [f"{arm}-seed{seed}" for seed in (1, 0) for arm in "bac"]
    job = json.loads((fake / "results" / "runs" / "order" / "b-seed0" / "job.json").read_text())
    assert (job["plan"], job["arm"], job["replicate"]) == ("order", "b", {"seed": 0})


# Publishing


@pytest.fixture
def trained(plan, finished_run, tmp_path):
    """`trained(**changes to environment)`: all runs of a plan of six arms and two replicates, as copies of one run."""

    def trained(names=None, **environment):
        expanded = study.expand(plan(ARMS))
        for name, job in expanded["jobs"].items():
            if job["report"] or (names and name not in names):
                continue
            folder = tmp_path / "results" / "runs" / "tiny" / name
            shutil.copytree(finished_run.path, folder, dirs_exist_ok=True)
            own = json.loads((folder / "environment.json").read_text()) | {"commit": "c" * 40, "uncommitted_changes": False}
            (folder / "environment.json").write_text(json.dumps(own | environment))
            (folder / "checksums.json").unlink()  # else it would be damaged
        study._note_changed_questions(expanded, tmp_path / "results" / "runs" / "tiny")
        return tmp_path / "results" / "published" / "tiny"

    return trained


@pytest.mark.slow
def test_a_published_plan_is_about_ten_files_without_a_path_of_this_machine(trained, tmp_path):
    published = trained()
    assert study.publish("tiny").startswith("12 runs packed anew, 12 of 12 in")
    names = {path.name for path in published.iterdir()}
    packed = {"runs.json.xz", "history.csv.xz", "splits.csv.xz", "predictions.csv.xz"}
    assert names == packed | {
        *("plan.yaml", "plan.json", "tables", "figures", "09_tables.ipynb", "10_figures.ipynb", "manifest.json")
    }
    assert (published / "tables" / "verdicts.md").exists()
    assert {path.suffix for path in (published / "figures").iterdir()} == {".png", ".pdf"}
    for notebook in published.glob("*.ipynb"):
        assert str(tmp_path) not in notebook.read_text()
    frame, original = runs.load(published), runs.load(tmp_path / "results" / "runs" / "tiny")
    pd.testing.assert_frame_equal(frame.drop(columns="path"), original.drop(columns="path"))
    again = tmp_path / "again"
    tables.write_all(frame, runs.plan(published), again)
    assert (again / "verdicts.md").read_text() == (published / "tables" / "verdicts.md").read_text()


def test_students_of_the_first_replicate_are_published_with_their_weights_and_stay(trained, finished_run, tmp_path):
    target = trained()
    source, expanded = tmp_path / "results" / "runs" / "tiny", study.expand("tiny")
    expanded["content"]["students"] = ["hdkd"]
    study._add_students(expanded, source, target, target)
    student = target / "students" / "hdkd"
    assert {path.name for path in student.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded, own = timm.create_model(f"local-dir:{student}", pretrained=True), finished_run.student("last")
    torch.testing.assert_close(loaded.state_dict(), own.state_dict(), rtol=0, atol=0)
    assert str(tmp_path) not in (student / "README.md").read_text()

    (source / "hdkd-draw0-seed0" / "last.safetensors").unlink()
    aside = tmp_path / "aside"
    study._add_students(expanded, source, target, aside)
    assert (aside / "students" / "hdkd" / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    study._add_students(expanded, source, tmp_path, tmp_path / "second")
    assert (tmp_path / "second" / "students" / "hdkd" / "model.safetensors").exists(), "another replicate has weights"
    for weights in source.glob("hdkd-*/last.safetensors"):
        weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no run of hdkd in .* has weights, .*; train hdkd-draw0-seed0 again"):
        study._add_students(expanded, source, tmp_path, tmp_path / "third")


def test_runs_that_do_not_belong_together_are_published_only_as_mixed(trained):
    published = trained()
    trained({"student-draw0-seed0"}, commit="d" * 40)
    trained({"hdkd-draw0-seed0"}, uncommitted_changes=True)
    own = published.parents[1] / "runs" / "tiny" / "again-draw0-seed0"
    job = {"plan": "tiny", "arm": "again", "replicate": {"draw": 0, "seed": 0}, "notebook": "run", "parameters": {"seed": 7}}
    (own / "job.json").write_text(json.dumps(job))
    message = (
        r"not published: its runs are of 2 commits \(c{12}, d{12}\); 1 runs had uncommitted .*hdkd-draw0.*; 1 runs have other "
    )
    for partial in (True, False):
        with pytest.raises(ValueError, match=message):
            study.publish("tiny", partial=partial)
    assert not (published / "runs.json.xz").exists()
    (own / "job.json").write_text(json.dumps(job | {"notebook": "03_student"}))
    with pytest.raises(ValueError, match=r"1 runs were made by another notebook than the plan's \(again-draw0-seed0, "):
        study.publish("tiny", partial=True)
    study.publish("tiny", partial=True, mixed=True)
    assert "its runs are of 2 commits" in tables.provenance(runs.load(published), runs.plan(published))


def test_what_is_finished_is_packed_and_added_to(trained):
    published = trained({"teacher-draw0-seed0", "student-draw0-seed0"})
    with pytest.raises(FileNotFoundError, match=r"tiny is not finished .teacher-draw1-seed1, student-draw1-seed1"):
        study.publish("tiny")
    assert study.publish("tiny", partial=True).startswith("2 runs packed anew, 2 of 12 in")
    (published / "notes.md").write_text("stays")
    (published / "manifest.json").write_text('{"files": {}}')
    (published / "tables").mkdir()
    trained({"hdkd-draw0-seed0"})
    assert study.publish("tiny", partial=True).startswith("1 runs packed anew, 3 of 12 in")
    assert (published / "notes.md").exists()
    assert not [file for file in ("manifest.json", "tables") if (published / file).exists()], "of fewer runs"
    assert tables.verdicts(runs.load(published), runs.plan(published)).verdict[0] == "1 of 2 replicates"
    published.rename(published.with_name(".tiny~before"))  # killed between the two renamings
    assert study.publish("tiny", partial=True).startswith("0 runs packed anew, 3 of 12 in")
