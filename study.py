"""The batch: plans (notebooks/plans/*.yaml) checked, expanded into jobs, run by Snakemake and papermill, and published.

    python study.py run smoke --cores 2     # what is missing of the plan, then its table; `make study` calls this
    python study.py run smoke --anew        # what is published does not count as done
    python study.py run smoke --profile profiles/slurm # its runs are jobs of a cluster (docs/clusters.md)
    python study.py publish smoke           # pack its runs, tables and figures into results/published/
    python study.py publish smoke --partial # pack what is finished so far, without tables and figures

A plan has `parameters` for every run, `replicates` (what differs between repetitions: seed, draw, fold), `threads` per run,
`reports` (notebooks that show the result, with their parameters if they are a dict), `students` (arms of which the networks of
the first replicate are published, with their weights), and `runs`, its arms: parameters of
run.ipynb, or of the chapter that is its `notebook` (`seed` is added to the replicate's), and `teacher`, the arm that teaches it
in the same replicate, or a pretrained network. An arm that is `like` another differs from it in what it says itself, and so
does a plan that `extends` another; dicts merge one level deep.

What is to be decided stands in the plan before anything runs: each of its `questions` asks a sentence (`ask`) and has
`contrasts`, pairs of arms by name, judged by `metric` at `epoch` (last, best or ema), where less than `smallest_difference`
does not matter.

A job's process imports nothing of the library and starts in a second; its notebook imports what it needs.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import psutil

ROOT = Path(__file__).parent
NOTEBOOKS = ROOT / "notebooks"
RESULTS = Path(os.environ.get("HDKD_RESULTS", ROOT / "results")).expanduser().resolve()
QUESTIONS = ("questions", "metric", "epoch", "smallest_difference")
KEYS = ["extends", "parameters", "replicates", "threads", "runs", "reports", "students", *QUESTIONS]
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}


def expand(plan: str) -> dict:
    """The plan as {"plan", "threads", "content", "jobs": {name: job}}, without paths.

    A job is {"notebook", "parameters", "needs", "report"}, and of a run "arm" and "replicate"; `content` is the plan's file
    with what it takes from the plan that it extends.

    Raises:
        ValueError: unknown plan, notebook, arm, teacher or key, a parameter that the notebook does not have, an option that the
            method does not have, or arms that are like one another in a circle.
    """
    content = _read(plan)
    _check_form(plan, content)
    arms = {arm: _arm(arm, content["runs"], plan) for arm in content["runs"]}
    jobs = {}
    for arm, (notebook, teacher, own) in arms.items():
        for replicate in content["replicates"]:
            suffix = "".join(f"-{key}{value}" for key, value in replicate.items())
            parameters = _merge(_merge(content.get("parameters") or {}, own), replicate)
            if "seed" in own and "seed" in replicate:
                parameters["seed"] = own["seed"] + replicate["seed"]
            needs = []
            if isinstance(teacher, dict):
                parameters["teacher"] = teacher
            elif teacher:
                needs = [_known(teacher, list(arms), f"teacher of run {arm} in {plan}.yaml") + suffix]
                if notebook == "run":
                    parameters["teacher"] = {"epoch": content.get("epoch", "best")}
                elif content.get("epoch", "best") != "best":
                    raise ValueError(f"{plan}.yaml: a teacher of {notebook}.ipynb teaches by its best epoch; say epoch: best")
            jobs[f"{arm}{suffix}"] = {
                "notebook": notebook, "parameters": parameters, "needs": needs, "report": False,
                "arm": arm, "replicate": replicate,
            }  # fmt: skip
    reports = content.get("reports", ["09_tables", "10_figures"])
    for notebook in reports:
        parameters = reports[notebook] if isinstance(reports, dict) else {}
        jobs[notebook.split("_")[1]] = {"notebook": notebook, "parameters": parameters, "needs": [], "report": True}
    for name, job in jobs.items():
        _check_parameters(name, job)
    for arm in content.get("students", []):
        _known(arm, list(arms), f"arm in students of {plan}.yaml")
    _check_questions(plan, content, list(arms))
    _check_arms(plan, [job for job in jobs.values() if job["notebook"] == "run"], content.get("epoch"))
    return {"plan": plan, "threads": content.get("threads", 1), "content": content, "jobs": jobs}


def _questions(content: dict) -> dict:
    return {key: content[key] for key in QUESTIONS if key in content}


def _merge(base: dict, own: dict) -> dict:
    """`base | own`, in which dicts that both have are joined in the same way."""
    both = {
        key: base[key] | own[key] for key in base.keys() & own if isinstance(base[key], dict) and isinstance(own[key], dict)
    }
    return base | own | both


def _arm(arm: str, runs: dict, plan: str, above: tuple = ()) -> tuple[str, str | dict, dict]:
    """Notebook, teacher and parameters of an arm, with what it takes from the arm that it is `like`."""
    if arm in above:
        raise ValueError(f"arms of {plan}.yaml are like one another in a circle: {', '.join((*above, arm))}")
    own = dict(runs[arm])
    notebook, teacher, parameters = "run", "", {}
    if "like" in own:
        of = _known(own.pop("like"), list(runs), f"arm that {arm} is like in {plan}.yaml")
        notebook, teacher, parameters = _arm(of, runs, plan, (*above, arm))
    return own.pop("notebook", notebook), own.pop("teacher", teacher), _merge(parameters, own)


def _check_form(plan: str, content: dict) -> None:
    """A plan has arms, and replicates that differ."""
    arms, replicates = content.get("runs"), content.get("replicates")
    if not isinstance(arms, dict) or not arms or not all(isinstance(of, dict) for of in arms.values()):
        raise ValueError(f"{plan}.yaml needs `runs`, its arms by name, such as teacher: {{network: hdkd_teacher_nano}}")
    if not isinstance(replicates, list) or not replicates or not all(isinstance(of, dict) for of in replicates):
        raise ValueError(f"{plan}.yaml needs `replicates`, a list such as [{{seed: 0}}, {{seed: 1}}]")
    if twice := [of for i, of in enumerate(replicates) if of in replicates[:i]]:
        raise ValueError(f"the replicate {twice[0]} is in {plan}.yaml twice; each has a seed, draw or fold of its own")


def _check_questions(plan: str, content: dict, arms: list[str]) -> None:
    """What is asked must be answerable by the plan's arms."""
    for name, question in content.get("questions", {}).items():
        for key in question:
            _known(key, ["ask", "contrasts"], f"key of question {name} in {plan}.yaml")
        if not question.get("ask") or not question.get("contrasts"):
            raise ValueError(f"question {name} in {plan}.yaml needs `ask`, a sentence, and `contrasts`, pairs of arms by name")
        for words, pair in question["contrasts"].items():
            if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"contrast {words!r} of question {name} in {plan}.yaml must be two arms, [a, b] (got {pair})")
            for arm in pair:
                _known(arm, arms, f"arm in contrast {words!r} of question {name} in {plan}.yaml")
    if "questions" in content and (missing := [key for key in QUESTIONS if key not in content]):
        raise ValueError(f"{plan}.yaml asks questions, which need {', '.join(missing)}, too")
    if "epoch" in content:
        _known(content["epoch"], ["last", "best", "ema"], f"epoch in {plan}.yaml")
    if not 0 < content.get("smallest_difference", 1) <= 1:
        raise ValueError(
            f"smallest_difference in {plan}.yaml must be above 0 and at most 1 (got {content['smallest_difference']})"
        )
    if "metric" in content:
        from hdkd_lib.tables import METRICS

        _known(content["metric"], [name for name in METRICS if name != "ece"], f"metric in {plan}.yaml")  # more is better


def _check_arms(plan: str, jobs: list[dict], epoch: str | None = None) -> None:
    """The names that only the library knows: networks, recipes and their fields, methods and their options."""
    for arm, job in {job["arm"]: job for job in jobs}.items():
        from hdkd_lib import experiment, inversion, models, recipes

        parameters = _defaults("run") | job["parameters"]
        try:
            experiment.check(parameters["method"], parameters["options"], has_teacher=bool(parameters["teacher"]))
            models.check_name(parameters["network"])
            recipe = recipes.get(**parameters["recipe"])
            if epoch == "ema" and not recipe.ema:
                raise ValueError("the plan's epoch is ema, and its recipe keeps no moving average; say ema: 0.99 in the recipe")
            inversion.settings(**parameters["synthesis"])
        except ValueError as error:
            raise ValueError(f"arm {arm} in {plan}.yaml: {error}") from error


def _read(plan: str) -> dict:
    """The plan's file, with what it takes from the plan that it extends."""
    from ruamel.yaml import YAML

    folder = NOTEBOOKS / "plans"
    path = folder / f"{_known(plan, [file.stem for file in folder.glob('*.yaml')], 'plan')}.yaml"
    content = YAML(typ="safe", pure=True).load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no keys; a plan has `runs` and `replicates` at least")
    for key in content:
        _known(key, KEYS, f"key in {path.name}")
    if "extends" not in content:
        return content
    base = _read(content.pop("extends"))
    for key in ("parameters", "runs", "questions"):
        if key in base | content:
            content[key] = base.get(key, {}) | content.get(key, {})
    return base | content


def paths(name: str, job: dict, folder: Path) -> dict[str, str]:
    """The parameters of a job that depend on where the plan's folder lies."""
    if job["report"]:
        return {"results": str(folder), "out": str(folder / name)}
    own = {"run_dir": str(folder / name)}
    for needed in job["needs"]:
        its = str(folder / needed)
        own |= (
            {"teacher": job["parameters"]["teacher"] | {"run_dir": its}} if job["notebook"] == "run" else {"teacher_dir": its}
        )
    return own


def _known(name: str, known: list[str], what: str) -> str:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}")
        )
    return name


def _check_parameters(name: str, job: dict) -> None:
    """papermill only warns of a parameter that a notebook does not have, and runs it with the default."""
    import papermill

    from hdkd_lib.parameters import check_type

    notebook = (
        NOTEBOOKS / f"{_known(job['notebook'], [f.stem for f in NOTEBOOKS.glob('*.ipynb')], f'notebook of {name}')}.ipynb"
    )
    accepted = papermill.inspect_notebook(str(notebook))
    for parameter, value in (job["parameters"] | paths(name, job, Path())).items():
        _known(parameter, list(accepted), f"parameter of {notebook.name} (run {name})")
        check_type(f"{parameter} of run {name}", value, TYPES.get(accepted[parameter]["inferred_type_name"]))


def execute(jobs_file: Path, name: str) -> None:
    """Executes one job's notebook into its folder. A run succeeded if it left a metrics.json: papermill cannot tell.

    Raises:
        RuntimeError: the notebook failed; the message names the run, the error and the executed notebook.
    """
    import papermill

    _end_with_parent()
    plan = json.loads(jobs_file.read_text())
    job = plan["jobs"][name]
    parameters = job["parameters"] | paths(name, job, jobs_file.parent)
    folder = jobs_file.parent / name
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / "run.ipynb"
    notebook = str(NOTEBOOKS / f"{job['notebook']}.ipynb")
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--log-level=50"]}

    def execute_notebook() -> None:
        papermill.execute_notebook(notebook, str(executed), parameters, **options)

    try:
        # In another thread than the main one, in which nbclient would take the signals that end this process.
        with _gpus(plan, name), ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(execute_notebook).result()
            except RuntimeError as error:
                if "Kernel died before replying" not in str(error):
                    raise
                # Jupyter picks TCP ports before its kernel takes them; of many kernels that start together one may be late.
                thread.submit(execute_notebook).result()
    except Exception as error:
        reason = f"{error.ename}: {error.evalue}" if hasattr(error, "evalue") else f"{type(error).__name__}: {error}"
        raise RuntimeError(f"run {name} failed: {reason}\n  its notebook with the error: {executed}") from error
    if not job["report"] and not (folder / "metrics.json").exists():
        raise RuntimeError(
            f"run {name} ended without a result (its kernel was killed?): {executed}; start the plan again to go on"
        )
    if not job["report"]:
        _write_job(folder, plan["plan"], job)


def _write_job(folder: Path, plan: str, job: dict) -> None:
    """Which run of which plan the folder holds."""
    _write_json(folder / "job.json", {"plan": plan} | {key: job[key] for key in ("arm", "replicate", "notebook", "parameters")})


def _write_json(file: Path, content: dict) -> None:
    """As `hdkd_lib.runs.write_json`: readers see the old content or the new, never half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(file)


def _end_with_parent() -> None:
    """Ends this process and its kernel when it is asked to end, or when the workflow is gone, also by kill -9: a kernel left
    alone would train on."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _end_all(5)

    _end_when_asked(5)
    threading.Thread(target=watch, daemon=True).start()


def _end_when_asked(seconds: float, message: str = "") -> None:
    """On SIGINT and SIGTERM, `_end_all`."""

    def end(number: int, _) -> None:
        print(message, end="", file=sys.stderr, flush=True)
        _end_all(seconds, 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _end_all(seconds: float, code: int = 137) -> None:
    """Ends this process after its children, which get so many seconds to keep the state of their runs."""
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    psutil.wait_procs(children, timeout=seconds)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


def prepare(jobs_file: Path) -> None:
    """Caches the decoded images for all runs, and writes prepared.json: how long each run will train on this machine, and the
    memory that finding out took.

    Raises:
        FileNotFoundError: the data are not there.
    """
    import resource

    import torch

    from hdkd_lib import data

    _end_with_parent()
    plan, folder = json.loads(jobs_file.read_text()), jobs_file.parent
    torch.set_num_threads(plan["threads"])
    missing = {name: job for name, job in plan["jobs"].items() if not job["report"] and not _is_finished(folder / name)}
    defaults = {notebook: _defaults(notebook) for notebook in {job["notebook"] for job in missing.values()}}
    loaded = set()
    for job in missing.values():
        parameters = defaults[job["notebook"]] | job["parameters"]
        named = ("root", "image_size", "protocol", "groups", "join_chains", "download")
        decoded = {key: parameters[key] for key in named if key in parameters}
        if (key := str((parameters.get("dataset"), decoded))) not in loaded and "dataset" in parameters:
            data.load(parameters["dataset"], **decoded)
            loaded.add(key)
    seconds = {name: _seconds(plan["jobs"], name) for name, job in missing.items() if job["notebook"] == "run"}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    _write_json(folder / "prepared.json", {"seconds": seconds, "mem_mb": memory})


def run(
    plan: str,
    cores: int,
    dry_run: bool = False,
    anew: bool = False,
    profile: Path | None = None,
    gpus: int | None = None,
    runs_per_gpu: int = 1,
) -> int:
    """Runs what is missing of the plan and prints its table; the exit code is 1 if a run failed.

    Args:
        anew: runs that are published, but were not trained here, are trained, too.
        profile: Snakemake's profile of a cluster, which then gives each job its GPU.
        gpus: how many of this machine's GPUs to use; default: all.
        runs_per_gpu: how many runs share a GPU.

    Raises:
        ValueError: the plan or the profile is wrong, or there are not so many GPUs; nothing has run.
    """
    import snakemake.cli

    expanded = expand(plan)
    expanded["cluster"] = _cluster(profile) if profile else None
    if profile and (gpus, runs_per_gpu) != (None, 1):
        raise ValueError("GPUS and RUNS_PER_GPU are for this machine; on a cluster say gpu: 1 in the profile")
    expanded |= _slots(gpus, runs_per_gpu, {} if profile else expanded["jobs"])
    folder = RESULTS / "runs" / plan
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")  # held until this function ends
    jobs_file = folder / ("dry-run.json" if dry_run else "jobs.json")
    if not dry_run:
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            print(f"the plan {plan} is running already; waiting for it to end", file=sys.stderr)
            lock.acquire()
        _mend(folder, expanded)
        _set_aside_changed(jobs_file, expanded)
        _take_published(expanded, folder, anew)
        _note_changed_questions(expanded, folder)
    _write_json(jobs_file, expanded)
    arguments = [
        "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--config", f"jobs={jobs_file}",
        "--scheduler", "greedy", "--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock",
        "--quiet", "rules", "host",
    ]  # fmt: skip
    if expanded["slots"]:
        arguments += ["--resources", f"gpu_slots={len(expanded['gpus']) * runs_per_gpu}"]
    arguments += ["--profile", str(profile.resolve()), "--local-cores", str(cores)] if profile else ["--cores", str(cores)]

    def workflow() -> int:
        try:
            snakemake.cli.main(arguments + ["--dry-run"] * dry_run)
        except SystemExit as exit:
            return exit.code

    # In this process, so that whoever ends it ends the workflow. A cluster's jobs Snakemake cancels itself; for those here it
    # would wait, and therefore it runs beside the main thread, which gets the signals.
    if profile:
        code = workflow()
    else:
        _end_when_asked(8, f"ending the runs of {plan}; start it again to go on\n")
        with ThreadPoolExecutor(1) as thread:
            code = thread.submit(workflow).result()
    lock.release()
    if dry_run:
        _print_power(expanded["content"])
        if not profile:
            _print_times(expanded, folder, cores)
        return code
    for name, job in expanded["jobs"].items():
        if not job["report"] and not _is_finished(folder / name):
            print(f"not finished: {name} ({folder / name / 'run.ipynb'}); start the plan again to go on", file=sys.stderr)
    if code:
        return 1
    reports = [folder / name for name, job in expanded["jobs"].items() if job["report"]]
    for report in reports:
        for table in sorted(report.glob("*.md"), reverse=True):  # verdicts first
            print(table.read_text())
    files = [file for report in reports for file in sorted(report.iterdir()) if file.suffix in (".csv", ".tex", ".png", ".pdf")]
    print("Tables and figures:", *files, sep="\n  ")
    return 0


def _slots(count: int | None, runs_per_gpu: int, jobs: dict) -> dict:
    """{"gpus": the first `count` that this process may use, as CUDA_VISIBLE_DEVICES names them; "runs_per_gpu"; "slots": on how
    many GPUs each run takes a slot}.

    Raises:
        ValueError: there are fewer GPUs than `count`, or than a run has processes.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        found, source = [gpu for gpu in visible.split(",") if gpu not in ("", "-1")], f"CUDA_VISIBLE_DEVICES={visible}"
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
        found, source = [str(i) for i in range(sum(line.startswith("GPU ") for line in listed))], "nvidia-smi -L"
    else:
        found, source = [], "there is no nvidia-smi"
    if count is not None and not 1 <= count <= len(found):
        raise ValueError(f"GPUS={count}, but this machine has {len(found)} GPUs ({source}); leave GPUS out to use all")
    if runs_per_gpu < 1:
        raise ValueError(f"RUNS_PER_GPU must be at least 1 (got {runs_per_gpu})")
    gpus, slots = found[:count], {}
    for name, job in jobs.items() if gpus else []:
        if not job["report"] and job["parameters"].get("device") != "cpu":
            slots[name] = job["parameters"].get("num_processes", 1)
            if slots[name] > len(gpus):
                raise ValueError(f"run {name} has {slots[name]} processes, each on a GPU of its own; it may use {len(gpus)}")
    return {"gpus": gpus, "runs_per_gpu": runs_per_gpu, "slots": slots}


@contextlib.contextmanager
def _gpus(plan: dict, name: str) -> Iterator[None]:
    """Waits for a free slot on as many GPUs as the run takes, and shows the kernel these GPUs only.

    A slot is the lock of a file in this machine's temporary folder, so plans that run at once share the slots. It is free again
    when the process ends, however it ends.
    """
    gpus, needed = plan["gpus"], plan["slots"].get(name, 0)
    folder = Path(tempfile.gettempdir()) / f"hdkd_lib-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        with contextlib.ExitStack() as stack:  # what is not enough is given back: another run may be waiting for it
            taken = []
            for number in range(len(gpus) * plan["runs_per_gpu"]):
                gpu = gpus[number % len(gpus)]
                lock = filelock.FileLock(folder / f"{gpu}-{number // len(gpus)}.lock", timeout=0)
                if len(taken) < needed and gpu not in taken:
                    with contextlib.suppress(filelock.Timeout):
                        stack.enter_context(lock)
                        taken.append(gpu)
            if len(taken) == needed:
                if needed:
                    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
                yield
                return
        time.sleep(0.5)


def _cluster(profile: Path) -> dict:
    """{"runtime": minutes}, the longest that a job may take by the profile, or None.

    Raises:
        ValueError: there is no such profile, its executor's plugin or SLURM is not installed, or its runtime is not in minutes.
    """
    from ruamel.yaml import YAML

    file = profile / "profile.yaml" if profile.is_dir() else profile
    if not file.is_file():
        known = ", ".join(f"profiles/{path.name}" for path in sorted((ROOT / "profiles").iterdir()))
        raise ValueError(f"no profile {file}; known: {known}")
    content = YAML(typ="safe", pure=True).load(file) or {}
    executor = content.get("executor", "local")
    plugin = f"snakemake-executor-plugin-{executor}"
    if executor != "local" and not importlib.util.find_spec(plugin.replace("-", "_")):
        raise ValueError(
            f"{file} needs {plugin}, which is not installed: {sys.executable} -m pip install -c constraints.txt {plugin}"
        )
    if executor == "slurm" and not shutil.which("sbatch"):
        raise ValueError("there is no SLURM here (no sbatch); start the plan on a login node of the cluster")
    runtime = (content.get("default-resources") or {}).get("runtime")
    if runtime is not None and not isinstance(runtime, int):
        raise ValueError(f"runtime in {file} must be a whole number of minutes (got {runtime!r})")
    return {"runtime": runtime}


def _print_power(content: dict) -> None:
    """What each contrast can show: the smallest difference that is found with 80 % power."""
    from hdkd_lib import statistics
    from hdkd_lib.data.splits import FOLDS, VALIDATION_FOLDS

    smallest, folds = 100 * content.get("smallest_difference", 0), {of.get("fold") for of in content["replicates"]}
    n = len(content["replicates"]) if len(folds) == 1 else len(folds)
    fraction, tested = (content.get("parameters") or {}).get("fraction", 1), 1 / FOLDS
    trained = (1 - tested) * (1 - 1 / VALIDATION_FOLDS) * fraction
    overlap = 1.0 if len(folds) == 1 else math.sqrt(1 + n * tested / trained)
    for question in content.get("questions", {}).values() if n > 1 else []:
        count = len(question["contrasts"])
        found = statistics.detectable(overlap, n, contrasts=count)
        folds_of = " folds, whose training images overlap" if len(folds) > 1 else ""
        print(f"\n{question['ask']} n = {n}{folds_of}, {count} contrast{'s' * (count > 1)}")
        for words, (a, b) in question["contrasts"].items():
            print(
                f"  {a} - {b} ({words}): finds {found:.1f} standard deviations of the paired differences with 80 % power, "
                f"{smallest:g} points if that is at most {smallest / found:.1f} points"
            )


def _print_times(expanded: dict, folder: Path, cores: int) -> None:
    """How long the runs of each arm will take here, measured on a few steps of each."""
    import torch

    jobs = {name: job for name, job in expanded["jobs"].items() if not job["report"]}
    torch.set_num_threads(expanded["threads"])
    jobs_file = folder / "jobs.json"
    before = _jobs_before(jobs_file, expanded)
    arms: dict[str, list[str]] = {}
    for name, job in jobs.items():
        is_done = _essence(before.get(name, job)) == _essence(job) and _is_finished(folder / name)
        arms.setdefault(job["arm"], []).extend([] if is_done else [name])
    total, width, chapters = 0.0, max(map(len, arms)), 0
    print(f"\n{'run':{width}}  to run  time of each, with {expanded['threads']} threads")
    for arm, names in arms.items():
        times = []
        for name in names:
            if jobs[name]["notebook"] != "run":
                chapters += 1
                continue
            try:
                times.append(_seconds(jobs, name))
            except FileNotFoundError as error:
                print(f"no estimate: {error}")
                return
        total += sum(times)
        each = {_duration(time): None for time in (min(times, default=0), max(times, default=0))}
        print(f"{arm:{width}}  {len(names):6}  {' to '.join(each) if times else ''}".rstrip(), flush=True)
    side_by_side = max(1, cores // expanded["threads"])
    besides = f", besides {chapters} chapters, which are not estimated" if chapters else ""
    print(f"in all about {_duration(total / side_by_side)} on {cores} cores, {side_by_side} runs side by side{besides}\n")


def _seconds(jobs: dict, name: str) -> float:
    """How long a run of run.ipynb will train here."""
    from hdkd_lib import estimate

    defaults, own = _defaults("run"), jobs[name]["parameters"]
    [teacher] = jobs[name]["needs"] or [None]
    return estimate.seconds(defaults | own, defaults | jobs[teacher]["parameters"] if teacher else own.get("teacher"))


@functools.cache
def _defaults(notebook: str) -> dict:
    import papermill

    inspected = papermill.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb"))
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in inspected.items()}


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _set_aside_changed(jobs_file: Path, expanded: dict) -> None:
    """Runs that left the plan or whose parameters, or whose teacher's, changed since its last start keep their results as
    NAME~before, NAME~before~, ..."""
    from hdkd_lib import runs

    if not (before := _jobs_before(jobs_file, expanded)):
        return
    if {name: _essence(job) for name, job in before.items()} != {n: _essence(job) for n, job in expanded["jobs"].items()}:
        for file in ("reports.done", "prepared.json"):
            (jobs_file.parent / file).unlink(missing_ok=True)
    changed = {name for name, job in before.items() if _essence(job) != _essence(expanded["jobs"].get(name))}
    while grown := {name for name, job in before.items() if changed & set(job.get("needs") or [])} - changed:
        changed |= grown
    for name in changed:
        path = jobs_file.parent / name
        with runs.lock(path):
            if path.exists():
                runs.set_aside(path, "before")


def _jobs_before(jobs_file: Path, expanded: dict) -> dict:
    """The jobs of the plan's last start; without a jobs.json, those that the job.json of its finished runs tell."""
    from hdkd_lib import runs

    if written := (runs.read_json(jobs_file) or {}).get("jobs"):
        return written
    files = (file for file in jobs_file.parent.glob("*/job.json") if "~" not in file.parent.name)
    found = {file.parent.name: runs.read_json(file) for file in files}
    unsaid = {"report": False, "needs": []}  # which teacher a run has is seen by its config.json, too
    return {name: unsaid | {"needs": expanded["jobs"].get(name, unsaid)["needs"]} | job for name, job in found.items() if job}


def _is_finished(folder: Path) -> bool:
    from hdkd_lib import runs

    return runs.read_json(folder / "metrics.json") is not None


def _essence(job: dict | None) -> dict | None:
    """What decides the result of a job, as JSON reads it."""
    return job and json.loads(json.dumps({key: job.get(key) for key in ("notebook", "parameters", "needs", "report")}))


def _mend(folder: Path, expanded: dict) -> None:
    """Sets aside what is damaged in the plan's folder and in those of its runs, which are then made anew.

    Weights are looked at where they are needed (`_take_published`). A run that another process trains now is left to it.
    """
    from hdkd_lib import runs

    runs.remove_unfinished(folder)
    for name in ("jobs.json", "plan.json", "prepared.json"):
        if (folder / name).exists() and runs.read_json(folder / name) is None:
            runs.set_damaged_aside(folder / name)
    for name, job in expanded["jobs"].items():
        if not job["report"]:
            _mend_run(folder / name, weights=False)


def _mend_run(folder: Path, weights: bool) -> None:
    from hdkd_lib import runs

    if folder.exists():
        with contextlib.suppress(filelock.Timeout), runs.lock(folder, wait=False):
            runs.mend(folder, weights=weights)


def _take_published(expanded: dict, folder: Path, anew: bool = False) -> None:
    """Runs that are published, but not here, are taken as done, unless `anew`; a teacher whose weights are needed, and are not
    here or damaged, is trained again."""
    from hdkd_lib import packing, runs

    source = RESULTS / "published" / expanded["plan"]
    published = {} if anew else runs.packed(source)
    jobs = {name: job for name, job in expanded["jobs"].items() if not job["report"]}

    packed = {
        name for name, run in published.items() if name in jobs and _configuration(run["job"]) == _configuration(jobs[name])
    }
    here = {name for name in jobs if (folder / name / "metrics.json").exists()}
    missing, with_weights, weights = set(jobs) - here - packed, set(), "last.safetensors"
    if anew:
        missing |= {name for name in here if not (folder / name / weights).exists()}  # they were published
    while needed := {teacher for name in missing for teacher in jobs[name]["needs"]} - with_weights - missing:
        for name in needed & here:
            _mend_run(folder / name, weights=True)
        with_weights |= {name for name in needed if _is_finished(folder / name) and (folder / name / weights).exists()}
        missing |= needed - with_weights
    for name in missing & here:
        (folder / name / "metrics.json").unlink(missing_ok=True)
    for name in (taken := sorted(packed - here - missing)):
        packing.unpack(source, name, folder / name)
    if taken:
        plan = expanded["plan"]
        print(f"{len(taken)} runs of {plan} are published and count as done; to train them: make study PLAN={plan} ANEW=1")
    for name in here - missing:
        if not (folder / name / "job.json").exists():
            _write_job(folder / name, expanded["plan"], jobs[name])


def _note_changed_questions(expanded: dict, folder: Path) -> None:
    """plan.json: what the plan says, and how many runs were finished when its questions changed; every table then says so."""
    from hdkd_lib import runs

    file, content = folder / "plan.json", json.loads(json.dumps({"name": expanded["plan"], **expanded["content"]}))
    before = runs.read_json(file) or runs.plan(RESULTS / "published" / expanded["plan"]) or content
    changed = before.get("questions_changed_after")
    if _questions(before) != _questions(content):
        changed = sum(_is_finished(folder / name) for name in expanded["jobs"]) or changed
        (folder / "reports.done").unlink(missing_ok=True)
    _write_json(file, content | ({"questions_changed_after": changed} if changed else {}))


def publish(plan: str, *, partial: bool = False, mixed: bool = False) -> str:
    """Packs the plan's runs without weights into results/published/PLAN (`hdkd_lib.packing`), and says what is there.

    A finished plan's report notebooks are executed on what was packed: tables and figures are those of the published files.

    Args:
        partial: pack the runs that are finished, without reports.
        mixed: publish runs of several commits, of uncommitted changes or of other parameters than the plan's, too; every table
            says so.

    Raises:
        FileNotFoundError: a run of the plan is not finished.
        ValueError: the runs are of several commits, of uncommitted changes or not of this plan, and `mixed` is not said.
    """
    from hdkd_lib import packing, runs

    expanded = expand(plan)
    source, target = RESULTS / "runs" / plan, RESULTS / "published" / plan
    former = target.with_name(f".{plan}~before")
    if former.exists() and not target.exists():  # stopped between the two renamings below
        former.rename(target)
    jobs = {name: job for name, job in expanded["jobs"].items() if not job["report"]}
    for name in jobs:
        _mend_run(source / name, weights=False)
    finished = {name: source / name for name in jobs if _is_finished(source / name)}
    missing = [name for name in jobs if name not in finished and name not in runs.packed(target)]
    if missing and not partial:
        raise FileNotFoundError(f"{plan} is not finished ({', '.join(missing)}); make study PLAN={plan}")
    for name, folder in finished.items():
        if not (folder / "job.json").exists():
            _write_job(folder, plan, jobs[name])
    aside = target.with_name(f".{plan}")
    shutil.rmtree(aside, ignore_errors=True)
    if partial and target.exists():  # tables of fewer runs, or of other ones, do not stay
        reports = {name: f"{job['notebook']}.ipynb" for name, job in expanded["jobs"].items() if job["report"]}
        shutil.copytree(target, aside, ignore=shutil.ignore_patterns("manifest.json", *reports, *reports.values()))
    aside.mkdir(parents=True, exist_ok=True)
    for file in (runs.PACKED, "history.csv.xz", "splits.csv.xz", "predictions.csv.xz"):
        if (target / file).exists():
            shutil.copyfile(target / file, aside / file)
    asked = {"metric": "accuracy", "epoch": "last"} | expanded["content"]
    new = packing.pack(finished, aside, asked["metric"], asked["epoch"], keep=jobs)
    packed = runs.packed(aside)
    if not packed or (not partial and packed.keys() != jobs.keys()):
        raise FileNotFoundError(f"no predictions of {', '.join(jobs.keys() - packed.keys())}; make study PLAN={plan}")
    content = {"name": plan, **expanded["content"]}
    before = runs.plan(source) or runs.plan(target)
    content |= {key: before[key] for key in ("questions_changed_after",) if key in before}
    if objections := _objections(packed, jobs):
        if not mixed:
            shutil.rmtree(aside)
            raise ValueError(f"{plan} is not published: {'; '.join(objections)}; repeat these runs, or say MIXED=1 (--mixed)")
        content["mixed"] = objections
    _write_json(aside / "plan.json", content)
    shutil.copyfile(NOTEBOOKS / "plans" / f"{plan}.yaml", aside / "plan.yaml")
    if not partial:
        _add_students(expanded, source, target, aside)
        _report(aside, expanded)
    shutil.rmtree(former, ignore_errors=True)  # whenever this is stopped, what was published or what is now is whole
    if target.exists():
        target.rename(former)
    aside.rename(target)
    shutil.rmtree(former, ignore_errors=True)
    return f"{len(new)} runs packed anew, {len(packed)} of {len(jobs)} in {target}"


def _add_students(expanded: dict, source: Path, target: Path, aside: Path) -> None:
    """students/ARM: network, weights and model card of the plan's `students`, those of the first replicate that has them here.

    Raises:
        FileNotFoundError: the run has no weights here, and none are published.
    """
    from hdkd_lib import data, export, runs

    epoch = expanded["content"].get("epoch", "best")
    for arm in expanded["content"].get("students", []):
        names = [name for name, job in expanded["jobs"].items() if job.get("arm") == arm]
        folder = Path("students", arm)
        here = [name for name in names if (source / name / f"{epoch}.safetensors").exists()]
        if names[0] not in here and (target / folder).exists():
            shutil.copytree(target / folder, aside / folder)
        elif here:
            run, root = runs.Run(source / here[0]), expanded["jobs"][here[0]]["parameters"].get("root")
            export.save(run, data.load_as(run.config["data"], root, run.split), aside / folder, epoch)
        else:
            raise FileNotFoundError(
                f"no run of {arm} in {source} has weights, and the plan publishes them; train {names[0]} again there"
            )


def _objections(packed: dict, jobs: dict) -> list[str]:
    """Why these runs should not stand in one table."""
    found = []
    ran = [run["environment"] for run in packed.values()]
    commits = {str(commit)[:12] for of in ran for commit in (of.get("commit"), *of.get("earlier_commits", ()))}
    if len(commits) > 1:
        found.append(f"its runs are of {len(commits)} commits ({', '.join(sorted(commits))})")
    if changed := [name for name, run in packed.items() if run["environment"].get("uncommitted_changes")]:
        found.append(f"{len(changed)} runs had uncommitted changes ({changed[0]}, ...)")
    if old := [name for name, run in packed.items() if run["job"]["notebook"] != jobs.get(name, run["job"])["notebook"]]:
        found.append(f"{len(old)} runs were made by another notebook than the plan's ({old[0]}, ...)")
    if other := [
        name
        for name, run in packed.items()
        if name in jobs and name not in old and _configuration(run["job"]) != _configuration(jobs[name])
    ]:
        found.append(f"{len(other)} runs have other parameters than the plan ({other[0]}, ...)")
    return found


def _configuration(job: dict) -> dict:
    """What a job trains, as JSON reads it."""
    return json.loads(json.dumps({key: job[key] for key in ("notebook", "parameters")}))


def _report(folder: Path, expanded: dict) -> None:
    """Executes the plan's report notebooks on the packed runs in `folder`, and writes the manifest of its files."""
    import nbformat
    import papermill

    for name, job in expanded["jobs"].items():
        if job["report"]:
            executed, parameters = folder / f"{job['notebook']}.ipynb", job["parameters"] | {"results": ".", "out": name}
            options = {"kernel_name": "python3", "progress_bar": False, "cwd": str(folder)}
            notebook = papermill.execute_notebook(str(NOTEBOOKS / executed.name), str(executed), parameters, **options)
            del notebook.metadata["papermill"]  # paths of this machine
            for cell in notebook.cells:
                cell.metadata.pop("papermill", None)
            nbformat.write(notebook, executed)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digests = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "manifest.json").write_text(json.dumps({"plan": expanded["plan"], "files": digests}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="run what is missing of a plan")
    command.add_argument("plan")
    command.add_argument("--cores", type=int, default=os.cpu_count())
    command.add_argument("--dry-run", action="store_true", help="only say what would run")
    command.add_argument("--anew", action="store_true", help="published runs do not count as done")
    command.add_argument("--profile", type=Path, help="Snakemake's profile of a cluster, such as profiles/slurm")
    command.add_argument("--gpus", type=int, help="how many of this machine's GPUs to use (default: all)")
    command.add_argument("--runs-per-gpu", type=int, default=1, help="how many runs share a GPU (default: 1)")
    command = commands.add_parser("publish", help="pack a finished plan, its tables and figures into results/published/")
    command.add_argument("plan")
    command.add_argument("--partial", action="store_true", help="pack the runs that are finished, without tables and figures")
    command.add_argument("--mixed", action="store_true", help="runs of several commits, too; every table says so")
    commands.add_parser("readme", help="write the numbers of README.md and of the texts in results/ anew")
    command = commands.add_parser("prepare", help="what a cluster's runs share; called by the Snakefile")
    command.add_argument("jobs_file", type=Path)
    command = commands.add_parser("execute", help="one job; called by the Snakefile")
    command.add_argument("jobs_file", type=Path)
    command.add_argument("name")
    arguments = parser.parse_args()
    try:
        if arguments.command == "run":
            return run(**{name: value for name, value in vars(arguments).items() if name != "command"})
        if arguments.command == "readme":
            from hdkd_lib import readme

            for name in readme.TEXTS:
                (ROOT / name).write_text(readme.write(name, (ROOT / name).read_text(), ROOT / "results"))
        elif arguments.command == "publish":
            print(publish(arguments.plan, partial=arguments.partial, mixed=arguments.mixed))
        elif arguments.command == "prepare":
            prepare(arguments.jobs_file)
        else:
            execute(arguments.jobs_file, arguments.name)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
