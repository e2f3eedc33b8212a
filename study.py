"""The batch: plans (notebooks/plans/*.yaml) checked, expanded into jobs, run by Snakemake and papermill, and published.

    python study.py run smoke --cores 2     # what is missing of the plan, then its table; `make study` calls this
    python study.py publish smoke           # copy what a reader needs to results/published/

A plan has `parameters` for every run, `notebooks` (parameters for every run of a notebook), `replicates` (what differs between
repetitions: seed, fold), `threads` per run, `reports` (notebooks that show the result), and `runs`: a notebook each, its own
`parameters`, and `teacher`, the run whose result with the same replicate is its teacher. A plan that `extends` another differs
from it in what it says itself.

Nothing here imports the library: a job's process starts in a second, its notebook imports what it needs.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import filelock
import psutil

ROOT = Path(__file__).parent
NOTEBOOKS = ROOT / "notebooks"
RESULTS = Path(os.environ.get("HDKD_RESULTS", ROOT / "results")).expanduser().resolve()
PUBLISHED_FILES = ("config.json", "environment.json", "history.csv", "predictions.csv", "metrics.json")


def expand(plan: str) -> dict:
    """The plan as {"threads", "jobs": {name: {"notebook", "parameters", "needs", "report"}}}, without paths.

    Raises:
        ValueError: unknown plan, notebook, teacher or key, or a parameter that the notebook does not have.
    """
    content = _read(plan)
    jobs = {}
    for kind, run in content["runs"].items():
        for key in run:
            _known(key, ["notebook", "parameters", "teacher"], f"key of run {kind} in {plan}.yaml")
        for replicate in content["replicates"]:
            suffix = "".join(f"-{key}{value}" for key, value in replicate.items())
            name = f"{kind}{suffix}"
            levels = (
                content.get("parameters"),
                content.get("notebooks", {}).get(run["notebook"]),
                run.get("parameters"),
                replicate,
            )
            parameters = {key: value for level in levels for key, value in (level or {}).items()}
            needs = []
            if "teacher" in run:
                needs = [_known(run["teacher"], list(content["runs"]), f"teacher of run {kind} in {plan}.yaml") + suffix]
            jobs[name] = {"notebook": run["notebook"], "parameters": parameters, "needs": needs, "report": False}
    for notebook in content.get("reports", ["09_tables", "10_figures"]):
        parameters = content.get("notebooks", {}).get(notebook, {})
        jobs[notebook.split("_")[1]] = {"notebook": notebook, "parameters": parameters, "needs": [], "report": True}
    for name in content.get("notebooks", {}):
        _known(name, [job["notebook"] for job in jobs.values()], f"notebook in {plan}.yaml")
    for name, job in jobs.items():
        _check_parameters(name, job)
    return {"threads": content.get("threads", 1), "jobs": jobs}


def _read(plan: str) -> dict:
    """The plan's file, with what it takes from the plan that it extends."""
    from ruamel.yaml import YAML

    folder = NOTEBOOKS / "plans"
    path = folder / f"{_known(plan, [file.stem for file in folder.glob('*.yaml')], 'plan')}.yaml"
    content = YAML(typ="safe", pure=True).load(path)
    for key in content:
        _known(key, ["extends", "parameters", "notebooks", "replicates", "threads", "runs", "reports"], f"key in {path.name}")
    if "extends" not in content:
        return content
    base = _read(content["extends"])
    own = {key: content[key] for key in ("replicates", "threads", "reports") if key in content}
    for key in ("parameters", "runs"):
        own[key] = base.get(key, {}) | content.get(key, {})
    notebooks = [plan.get("notebooks", {}) for plan in (base, content)]
    own["notebooks"] = {
        name: {**notebooks[0].get(name, {}), **notebooks[1].get(name, {})} for name in {**notebooks[0], **notebooks[1]}
    }
    return base | own


def paths(name: str, job: dict, folder: Path) -> dict[str, str]:
    """The parameters of a job that depend on where the plan's folder lies."""
    if job["report"]:
        return {"results": str(folder), "out": str(folder / name)}
    return {"run_dir": str(folder / name)} | ({"teacher_dir": str(folder / job["needs"][0])} if job["needs"] else {})


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

    notebook = (
        NOTEBOOKS / f"{_known(job['notebook'], [f.stem for f in NOTEBOOKS.glob('*.ipynb')], f'notebook of {name}')}.ipynb"
    )
    accepted = list(papermill.inspect_notebook(str(notebook)))
    for parameter in job["parameters"] | paths(name, job, Path()):
        _known(parameter, accepted, f"parameter of {notebook.name} (run {name})")


def execute(jobs_file: Path, name: str) -> None:
    """Executes one job's notebook into its folder. A run succeeded if it left a metrics.json: papermill cannot tell.

    Raises:
        RuntimeError: the notebook failed; the message names the run, the error and the executed notebook.
    """
    import papermill

    _end_with_parent()
    job = json.loads(jobs_file.read_text())["jobs"][name]
    parameters = job["parameters"] | paths(name, job, jobs_file.parent)
    folder = jobs_file.parent / name
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / "run.ipynb"
    notebook = str(NOTEBOOKS / f"{job['notebook']}.ipynb")
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--log-level=50"]}
    try:
        try:
            papermill.execute_notebook(notebook, str(executed), parameters, **options)
        except RuntimeError as error:
            if "Kernel died before replying" not in str(error):
                raise
            # Jupyter picks TCP ports before its kernel takes them; of many kernels that start together one may come too late.
            papermill.execute_notebook(notebook, str(executed), parameters, **options)
    except Exception as error:
        reason = f"{error.ename}: {error.evalue}" if hasattr(error, "evalue") else f"{type(error).__name__}: {error}"
        raise RuntimeError(f"run {name} failed: {reason}\n  its notebook with the error: {executed}") from error
    if not job["report"] and not (folder / "metrics.json").exists():
        raise RuntimeError(
            f"run {name} ended without a result (its kernel was killed?): {executed}; start the plan again to go on"
        )


def _end_with_parent() -> None:
    """Ends this process and its kernel when the workflow is gone, also by kill -9; a kernel left alone would train on."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(137)

    threading.Thread(target=watch, daemon=True).start()


def run(plan: str, cores: int, dry_run: bool = False) -> int:
    """Runs what is missing of the plan and prints its table; the exit code is 1 if a run failed."""
    import snakemake.cli

    expanded = expand(plan)
    folder = RESULTS / "runs" / plan
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")  # held until this function ends
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"the plan {plan} is running already; waiting for it to end", file=sys.stderr)
        lock.acquire()
    jobs_file = folder / ("dry-run.json" if dry_run else "jobs.json")
    if not dry_run:
        _set_aside_changed(jobs_file, expanded)
    jobs_file.write_text(json.dumps(expanded, indent=1))
    arguments = [
        "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--config", f"jobs={jobs_file}",
        "--cores", str(cores), "--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock",
        "--quiet", "rules", "host",
    ]  # fmt: skip
    try:  # in this process, so that whoever ends it ends the workflow
        snakemake.cli.main(arguments + ["--dry-run"] * dry_run)
    except SystemExit as exit:
        code = exit.code
    finally:
        lock.release()
    if dry_run:
        _print_times(expanded, folder, cores)
        return code
    for name, job in expanded["jobs"].items():
        if not job["report"] and not (folder / name / "metrics.json").exists():
            print(f"not finished: {name} ({folder / name / 'run.ipynb'}); start the plan again to go on", file=sys.stderr)
    if code:
        return 1
    reports = [folder / name for name, job in expanded["jobs"].items() if job["report"]]
    for report in reports:
        for table in sorted(report.glob("*.md")):
            print(table.read_text())
    files = [file for report in reports for file in sorted(report.iterdir()) if file.suffix in (".csv", ".png")]
    print("Tables and figures:", *files, sep="\n  ")
    return 0


def _print_times(expanded: dict, folder: Path, cores: int) -> None:
    """How long each kind of run will take here, measured on a few steps of its networks."""
    import torch

    from hdkd_lib import estimate

    jobs = {name: job for name, job in expanded["jobs"].items() if not job["report"]}
    torch.set_num_threads(expanded["threads"])
    parameters = {name: _defaults(job["notebook"]) | job["parameters"] for name, job in jobs.items()}
    jobs_file = folder / "jobs.json"
    before = json.loads(jobs_file.read_text())["jobs"] if jobs_file.exists() else expanded["jobs"]
    kinds: dict[str, list[str]] = {}
    for name in jobs:
        kinds.setdefault(name.rsplit("-seed", 1)[0], []).append(name)
    total, width = 0.0, max(map(len, kinds))
    print(f"\n{'run':{width}}  to run  time of each, with {expanded['threads']} threads")
    for kind, names in kinds.items():
        missing = [n for n in names if before.get(n) != jobs[n] or not (folder / n / "metrics.json").exists()]
        each = ""
        if missing:
            [teacher] = jobs[names[0]]["needs"] or [None]
            try:
                seconds = estimate.seconds(parameters[names[0]], parameters.get(teacher))
            except FileNotFoundError as error:
                print(f"no estimate: {error}")
                return
            total += seconds * len(missing)
            each = _duration(seconds)
        print(f"{kind:{width}}  {len(missing):6}  {each}", flush=True)
    side_by_side = max(1, cores // expanded["threads"])
    print(f"in all about {_duration(total / side_by_side)} on {cores} cores, {side_by_side} runs side by side\n")


def _defaults(notebook: str) -> dict:
    import papermill

    inspected = papermill.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb"))
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in inspected.items()}


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _set_aside_changed(jobs_file: Path, expanded: dict) -> None:
    """Runs that left the plan or whose parameters changed since its last start keep their results as NAME~1, NAME~2, ..."""
    if not jobs_file.exists():
        return
    before = json.loads(jobs_file.read_text())["jobs"]
    if before != expanded["jobs"]:
        (jobs_file.parent / "reports.done").unlink(missing_ok=True)
    for name, job in before.items():
        path = jobs_file.parent / name
        if path.exists() and expanded["jobs"].get(name) != job:
            number = 1
            while path.with_name(f"{name}~{number}").exists():
                number += 1
            path.rename(path.with_name(f"{name}~{number}"))


def publish(plan: str) -> Path:
    """Copies a finished plan's metrics, histories, predictions, splits, tables and figures to results/published/PLAN.

    Raises:
        FileNotFoundError: a run of the plan is not finished.
    """
    expanded = expand(plan)
    source, target = RESULTS / "runs" / plan, RESULTS / "published" / plan
    names = [name for name, job in expanded["jobs"].items() if not job["report"]]
    if unfinished := [name for name in names if not (source / name / "metrics.json").exists()]:
        raise FileNotFoundError(f"{plan} is not finished ({', '.join(unfinished)}); make study PLAN={plan}")
    aside = target.with_name(f".{plan}")
    shutil.rmtree(aside, ignore_errors=True)
    for name in names:
        (aside / name).mkdir(parents=True)
        for file in PUBLISHED_FILES:
            shutil.copyfile(source / name / file, aside / name / file)
        data = json.loads((source / name / "config.json").read_text())["data"]
        split = aside / "splits" / f"{data['dataset']}-{data['protocol']}-fold{data['fold']}-fraction{data['fraction']:g}.csv"
        split.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name / "split.csv", split)
    for name in (name for name, job in expanded["jobs"].items() if job["report"]):
        shutil.copytree(source / name, aside / name, ignore=shutil.ignore_patterns("*.ipynb"))
    shutil.copyfile(NOTEBOOKS / "plans" / f"{plan}.yaml", aside / "plan.yaml")
    files = sorted(file for file in aside.rglob("*") if file.is_file())
    manifest = {
        "plan": plan,
        "files": {f.relative_to(aside).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="run what is missing of a plan")
    command.add_argument("plan")
    command.add_argument("--cores", type=int, default=os.cpu_count())
    command.add_argument("--dry-run", action="store_true", help="only say what would run")
    command = commands.add_parser("publish", help="copy a finished plan to results/published/")
    command.add_argument("plan")
    command = commands.add_parser("execute", help="one job; called by the Snakefile")
    command.add_argument("jobs_file", type=Path)
    command.add_argument("name")
    arguments = parser.parse_args()
    try:
        if arguments.command == "run":
            return run(arguments.plan, arguments.cores, arguments.dry_run)
        if arguments.command == "publish":
            print(publish(arguments.plan))
        else:
            execute(arguments.jobs_file, arguments.name)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
