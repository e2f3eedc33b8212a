# One job per run of a plan, then its tables and figures. Started by `make study PLAN=...` (study.py), which writes the plan's jobs as
# JSON; edit notebooks/plans/*.yaml, not this file.
import json
import os
import sys

STUDY = f"{sys.executable} {workflow.basedir}/study.py execute {config['jobs']}"
PLAN = json.load(open(config["jobs"]))

os.environ["TQDM_DISABLE"] = "1"


RESULTS = [f"{name}/metrics.json" for name, job in PLAN["jobs"].items() if not job["report"]]
REPORTS = [name for name, job in PLAN["jobs"].items() if job["report"]]


rule all: # every run by name: Snakemake does not miss the input of a report that is there
    input:
        RESULTS,
        "reports.done",


rule run:
    input:
        lambda wildcards: [f"{name}/metrics.json" for name in PLAN["jobs"][wildcards.name]["needs"]],
    output:
        "{name}/metrics.json",
    log:
        "{name}/run.ipynb",
    threads: PLAN["threads"]
    shell:
        "exec env OMP_NUM_THREADS={threads} {STUDY} {wildcards.name}"


rule report:
    input:
        RESULTS,
    output:
        touch("reports.done"),
    shell:
        " && ".join(f"{STUDY} {name}" for name in REPORTS)
