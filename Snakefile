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
REPLICATES = {}
for name, job in PLAN["jobs"].items():
    if not job["report"]:
        REPLICATES.setdefault(json.dumps(job["replicate"]), []).append(name)


rule all: # every run by name: Snakemake does not miss the input of a report that is there
    input:
        RESULTS,
        "reports.done",


# A rule per replicate, since priorities belong to rules: what a plan has not finished is then a replicate, not an arm of each.
# A teacher's date does not matter (`ancient`): study.py sets the students of a changed teacher aside.
for number, names in enumerate(REPLICATES.values()):

    rule:
        name:
            f"replicate{number}"
        wildcard_constraints:
            name="|".join(names),
        input:
            lambda wildcards: [ancient(f"{name}/metrics.json") for name in PLAN["jobs"][wildcards.name]["needs"]],
        output:
            "{name}/metrics.json",
        log:
            "{name}/run.ipynb",
        priority: len(REPLICATES) - number
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
