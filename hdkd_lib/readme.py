"""The numbers in texts: what stands between `<!-- BLOCK -->` and `<!-- end -->` is written from results/ by `make readme`.

A block is the name of a function of this module, and the plan that it is about, if it is about one.
"""

import json
import re
from pathlib import Path

import pandas as pd

from hdkd_lib import runs, tables
from hdkd_lib.statistics import interval

# Plan, what the plan compares, and the two arms whose difference it is.
EARLIER = (
    ("brain_tumor_nano", "HDKD - its student without a teacher", "hdkd", "student"),
    ("hdkd_ablations", "HDKD - its student without a teacher", "hdkd", "student"),
    ("hdkd_ablations", "HDKD - distilling logits only", "hdkd", "logits_only"),
    ("cskd_ablations", "CSKD - without its spatial term", "cskd", "spatial_0"),
    ("cskd_ablations", "CSKD - a teacher that answers for the whole image only", "cskd", "grid_1x1"),
    ("dearkd_ablations", "DearKD - without its early features", "dearkd", "taps_none"),
    ("dearkd_ablations", "DearKD - a teacher that teaches to the end", "dearkd", "switch_never"),
    ("data_free_nano", "data-free - without the intra-divergence loss", "data_free", "no_divergence"),
)
MAIN = ("teacher", "student", "hdkd", "vit", "deit", "cskd", "mhca", "dearkd")  # arms whose scores a text gives


def verdicts(results: Path, plan: str) -> str:
    """The questions of a plan and what its runs say; the figure of contrasts, once there are verdicts."""
    folder = results / "published" / plan
    table = tables.verdicts(runs.load(folder), runs.plan(folder))[
        ["claim", "contrast", "n", "difference", "verdict", "training time"]
    ]
    table["claim"] = table.claim.where(~table.claim.duplicated(), "")  # once for all contrasts of a question
    text = table.to_markdown(index=False, disable_numparse=True)
    figure = folder / "figures" / "contrasts.png"
    alt = f"every contrast of {plan}: differences of each replicate, their mean and its interval"
    return text + (f"\n\n![{alt}]({figure.relative_to(results.parent).as_posix()})" if figure.exists() else "")


def progress(results: Path, plan: str) -> str:
    """How much of a plan is finished."""
    folder = results / "published" / plan
    content, done = runs.plan(folder), runs.packed(folder).values()
    replicates, arms = [json.dumps(of) for of in content["replicates"]], len(content["runs"])
    found = [json.dumps(of["job"]["replicate"]) for of in done]
    count, complete = len(replicates), sum(found.count(of) == arms for of in replicates)
    finished = f"{complete} of {count} replicates are finished ({len(found)} of {count * arms} runs)."
    return finished + " A verdict is given when both of its arms have all replicates, not before." * (complete < count)


def scores(results: Path, plan: str) -> str:
    """Scores of the main arms of a plan that have all their replicates, and of classifiers that train no network."""
    folder = results / "published" / plan
    frame, content = runs.load(folder), runs.plan(folder)
    finished = frame.groupby("arm").size() == len(content["replicates"])
    metric, epoch = content["metric"], content["epoch"]
    named = {
        tables.title(arm): interval(tables.scores(frame[frame.arm == arm], metric, epoch)) for arm in MAIN if finished.get(arm)
    }
    if not named:
        return "No arm has all its replicates yet."
    words = tables.METRICS[metric]
    text = f"{words[0].upper()}{words[1:]} in percent at the {epoch} epoch: "
    text += f"{', '.join(f'{name} {score}' for name, score in named.items())}."
    file = folder / "tables" / "baselines.csv"
    if file.exists():
        means = pd.read_csv(file).groupby("classifier", sort=False)[metric].mean()
        text += f" Without training a network: {', '.join(f'{name} {100 * mean:.1f}' for name, mean in means.items())}."
    return text


def earlier(results: Path) -> str:
    """What plans of three replicates found: differences of balanced accuracy with 95 % t intervals."""
    frames = {plan: runs.load(results / "published" / plan) for plan in dict.fromkeys(plan for plan, *_ in EARLIER)}
    rows = []
    for plan, words, a, b in EARLIER:
        frame = frames[plan]
        pairs = frame[frame.run == a].merge(frame[frame.run == b], on=["seed", "fold", "fraction"], suffixes=("", "_b"))
        differences = [
            f"{interval(pairs[column] - pairs[f'{column}_b']):+}" for column in ("last_balanced_accuracy", "balanced_accuracy")
        ]
        rows.append([f"`{plan}`", words, len(pairs), *differences])
    columns = ["plan", "contrast", "n", "last epoch", "epoch chosen on validation"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False)


def commits(results: Path) -> str:
    """What each earlier plan is: its runs, the commits that they carry, and how to repeat it."""
    rows = []
    for plan in dict.fromkeys(plan for plan, *_ in EARLIER) | {"data_efficiency": None}:
        frame = runs.load(results / "published" / plan)
        carried = ", ".join(f"`{commit[:7]}`" for commit in sorted(set(frame.commit)))
        rows.append([f"[{plan}](published/{plan})", frame.dataset.iloc[0], frame.arm.nunique(), len(frame), carried])
    return pd.DataFrame(rows, columns=["plan", "images", "arms", "runs", "commits"]).to_markdown(index=False)


def leaks(results: Path) -> str:
    """The nearest neighbour on pixels under random and grouped folds."""
    rows = []
    for dataset, title in (("brain_tumor", "brain tumour MRI"), ("ham10000", "HAM10000")):
        scores = pd.read_csv(results / "audits" / dataset / "leakage_gain.csv")
        scores = scores[scores.classifier == "nearest neighbour"].groupby("protocol").balanced_accuracy.mean()
        rows.append([title, *(f"{100 * scores[protocol]:.1f}" for protocol in ("random", "grouped"))])
    return pd.DataFrame(rows, columns=["images", "random folds", "grouped folds"]).to_markdown(
        index=False, disable_numparse=True
    )


def copies(results: Path) -> str:
    """What the audit of the brain tumour set's published split found."""
    card = json.loads((results / "audits" / "brain_tumor" / "card.json").read_text())
    found, count = card["test_images_with_exact_duplicate_in_train"], card["test_images"]
    return f"In the brain tumour set's published split, {found} of {count} test images are pixel-identical to a training image."


def trials(results: Path, plan: str) -> str:
    """What validation said of every trial of a P0; the test images are not looked at."""
    folder, rows = results / "published" / plan, []
    metric = runs.plan(folder).get("metric", "accuracy")
    for run in runs.packed(folder).values():
        method, recipe, measured = run["config"]["method"], run["config"]["recipe"], run["metrics"]
        logits = f"{method['distill_type']}, tau {method['tau']:g}" if "distill_type" in method else ""
        scores = measured["last"]["train"]["accuracy"], *(measured[epoch]["val"][metric] for epoch in ("last", "best"))
        name = method["student"]["name"] + " (head only)" * method.get("probe", False)
        decay = recipe.get("layer_decay", 1.0)
        rate = f"{recipe['lr']:g}" + (f", {decay:g} from block to block" if decay < 1 else "")
        network = [f"`{run['job']['arm']}`", name, recipe["epochs"], rate, logits]
        rows.append([*network, *(f"{100 * score:.1f}" for score in scores)])
    columns = ["trial", "network", "epochs", "rate", "distillation of logits", "training images, clean"]
    table = pd.DataFrame(rows, columns=[*columns, "validation, last epoch", "best epoch"])
    return table.to_markdown(index=False, disable_numparse=True)


def pixels(results: Path, plan: str) -> str:
    """What classifiers on pixels reach on P0's validation images."""
    scores = pd.read_csv(results / "published" / plan / "pixels.csv").set_index("classifier").balanced_accuracy
    both = " and ".join(f"{name} {100 * score:.1f} %" for name, score in scores.items())
    return f"On 16x16 grey pixels of the same images: {both} on validation; chance is 10 %."


def synthesis(results: Path, plan: str) -> str:
    """How near the images that a P0 made from its teacher come to the real ones for validation, the nearest first."""
    rows = []
    for run in runs.packed(results / "published" / plan).values():
        if "synthesis_quality" not in run["metrics"]:  # the teacher
            continue
        settings = run["job"]["parameters"]["synthesis"]
        changed = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "per_class")
        measured, seconds = run["metrics"]["synthesis_quality"], run["metrics"]["synthesis_seconds"]
        distance = f"{measured['frechet_distance']:.2f}", f"{measured['statistics_gap']:.2f}"
        shares = (f"{100 * measured[name]:.1f}" for name in ("accuracy", "precision", "recall"))
        rows.append([f"`{run['job']['arm']}`", changed, *distance, *shares, f"{measured['diversity']:.2f}", f"{seconds:.0f}"])
    columns = ["trial", "changed", "Fréchet distance", "gap of statistics", "accuracy", "precision", "recall", "diversity"]
    table = pd.DataFrame(rows, columns=[*columns, "seconds"]).sort_values("Fréchet distance", key=lambda of: of.astype(float))
    return table.to_markdown(index=False, disable_numparse=True)


WRITERS = {
    writer.__name__: writer
    for writer in (verdicts, scores, progress, earlier, commits, leaks, copies, trials, pixels, synthesis)
}
# The blocks of each text, by its path in the repository.
TEXTS: dict[str, tuple[str, ...]] = {
    "README.md": (
        "verdicts few_images",
        "scores few_images",
        "progress few_images",
        "verdicts skin",
        "scores skin",
        "leaks",
        "copies",
    ),
    "results/README.md": ("earlier", "commits"),
    "results/few_images_p0.md": ("trials few_images_p0", "pixels few_images_p0"),
    "results/skin_p0.md": ("trials skin_p0",),
    "results/data_free_p0.md": ("synthesis data_free_p0",),
}


def write(name: str, text: str, results: Path) -> str:
    """The text of one of `TEXTS` with every block written anew.

    Raises:
        ValueError: a block has no end or another name, or one is missing.
    """
    blocks = TEXTS[name]
    found = re.findall(r"<!-- ([\w ]+) -->\n", text)
    if sorted(found[::2]) != sorted(blocks) or found[1::2] != ["end"] * len(blocks):
        raise ValueError(
            f"{name} must hold each of the blocks {', '.join(blocks)} once, with its end (found {', '.join(found)})"
        )
    for block in blocks:
        writer, *plan = block.split()
        written = WRITERS[writer](results, *plan)
        new = f"<!-- {block} -->\n{written}\n<!-- end -->"
        text = re.sub(rf"<!-- {block} -->\n.*?<!-- end -->", lambda _, new=new: new, text, flags=re.S)
    return text
