# One job per run of a plan, then its tables and figures. Started by `make study PLAN=...` (study.py), which writes the plan's jobs as
# JSON; edit notebooks/plans/*.yaml, not this file.
import json
import os
import shlex
import sys

STUDY, JOBS = f"{shlex.quote(sys.executable)} {shlex.quote(workflow.basedir + '/study.py')}", config["jobs"]
PLAN = json.load(open(JOBS))

os.environ["TQDM_DISABLE"] = "1"


RESULTS = [f"{name}/metrics.json" for name, job in PLAN["jobs"].items() if not job["report"]]
REPORTS = [name for name, job in PLAN["jobs"].items() if job["report"]]

# Replicate by replicate, each in the plan's order: what a plan has not finished is then a replicate, not an arm of each.
replicates = list(dict.fromkeys(json.dumps(job.get("replicate")) for job in PLAN["jobs"].values()))
RUNS = [(name, job) for name, job in PLAN["jobs"].items() if not job["report"]]
RUNS.sort(key=lambda run: replicates.index(json.dumps(run[1]["replicate"])))



def waits(name):
    """On a cluster, a run that is not finished waits for rule `prepare`."""
    return ["prepared.json"] if PLAN["cluster"] and not os.path.exists(f"{name}/metrics.json") else []


def resources(name, job):
    """Of such a run, from what was measured there; a chapter, which is not measured, has the profile's."""
    if not waits(name) or job["notebook"] != "run":
        return {}
    longest = PLAN["cluster"]["runtime"] or float("inf")

    def minutes(wildcards, input):
        seconds = json.load(open(input[-1]))["seconds"] # without those that were finished when it was written
        return int(min(longest, 10 + 3 * seconds.get(name, max(seconds.values(), default=3600)) / 60))

    def megabytes(wildcards, input, attempt):
        return 1000 + 2 * attempt * json.load(open(input[-1]))["mem_mb"]

    return {"runtime": minutes, "mem_mb": megabytes}


localrules:
    all,
    report,


rule all: # every run by name: Snakemake does not miss the input of a report that is there
    input:
        RESULTS,
        "reports.done",


rule prepare: # on a cluster, once: images decoded, times and memory measured
    output:
        "prepared.json",
    threads: PLAN["threads"]
    shell:
        "exec env OMP_NUM_THREADS={threads} {STUDY} prepare {JOBS:q}"


for number, (folder, job) in enumerate(RUNS): # a rule each, since priorities belong to rules

    rule:
        name:
            f"run{number}"
        input: # whatever its date: study.py sets the students of a changed teacher aside
            [ancient(f"{teacher}/metrics.json") for teacher in job["needs"]],
            waits(folder),
        output:
            f"{folder}/metrics.json",
        log:
            f"{folder}/run.ipynb",
        params:
            folder=folder,
        priority: len(RUNS) - number
        threads: PLAN["threads"]
        resources:
            gpu_slots=PLAN["slots"].get(folder, 0),
            **resources(folder, job),
        shell:
            "exec env OMP_NUM_THREADS={threads} {STUDY} execute {JOBS:q} {params.folder:q}"


rule report:
    input:
        RESULTS,
    output:
        touch("reports.done"),
    shell:
        " && ".join(f"{STUDY} execute {shlex.quote(JOBS)} {shlex.quote(name)}" for name in REPORTS)
