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

# Replicate by replicate, each in the plan's order: what a plan has not finished is then a replicate, not an arm of each.
replicates = list(dict.fromkeys(json.dumps(job.get("replicate")) for job in PLAN["jobs"].values()))
RUNS = [(name, job) for name, job in PLAN["jobs"].items() if not job["report"]]
RUNS.sort(key=lambda run: replicates.index(json.dumps(run[1]["replicate"])))


rule all: # every run by name: Snakemake does not miss the input of a report that is there
    input:
        RESULTS,
        "reports.done",


for number, (folder, job) in enumerate(RUNS): # a rule each, since priorities belong to rules

    rule:
        name:
            f"run{number}"
        input: # whatever its date: study.py sets the students of a changed teacher aside
            [ancient(f"{teacher}/metrics.json") for teacher in job["needs"]],
        output:
            f"{folder}/metrics.json",
        log:
            f"{folder}/run.ipynb",
        params:
            folder=folder,
        priority: len(RUNS) - number
        threads: PLAN["threads"]
        shell:
            "exec env OMP_NUM_THREADS={threads} {STUDY} {params.folder}"


rule report:
    input:
        RESULTS,
    output:
        touch("reports.done"),
    shell:
        " && ".join(f"{STUDY} {name}" for name in REPORTS)
