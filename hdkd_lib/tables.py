"""Tables from run folders, or from what is packed of them: verdicts on a plan's questions, accuracies, ablations.

Test images that the audit of a published split finds in its training part are left out of verdicts and accuracies; their ids
are in data/test_in_train/DATASET.csv.
"""

import contextlib
import difflib
import functools
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hdkd_lib import methods, runs, statistics
from hdkd_lib.metrics import Predictions, auroc_of, weighted
from hdkd_lib.parameters import one_sentence
from hdkd_lib.recipes import Recipe
from hdkd_lib.runs import Run
from hdkd_lib.statistics import Contrast, interval

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "ece": "ECE",
}
SELECTION = {"validation": "validation", "test": "test (the paper's protocol: optimistic)"}
LEARNED = 0.9  # of its own training images, without augmentation: a network that knows fewer has not learned
RESAMPLES = 1000  # of the test images, for metrics that are no mean over images


def verdicts(frame: pd.DataFrame, plan: Mapping) -> pd.DataFrame:
    """What a plan's runs say about its questions: one row per contrast, for readers.

    Columns: claim (the question), contrast, n (replicates), difference (a - b in percentage points with the interval that is
    simultaneous within the question), verdict, other sign (single replicates that told the opposite), p (sign-flip test, from
    n = 8), and training time of a and b in units of the plain student's, teacher included. `contrasts` has the numbers.
    """
    rows = []
    for row in contrasts(frame, plan).itertuples():
        known = isinstance(row.result, Contrast)
        verdict = row.verdict
        if known and verdict == "undecided":
            needed = row.result.needed
            if needed and needed <= row.n:  # the smallest difference would have been found; a smaller one may be there
                verdict += f" (powered for {100 * plan['smallest_difference']:g} points)"
            else:
                verdict += f" ({needed} replicates needed)" if needed else " (more images needed)"
        rows.append(
            {
                "claim": row.claim,
                "contrast": f"{title(row.a)} - {title(row.b)}: {row.contrast}",
                "n": row.n,
                "difference": row.result.text if known else "",
                "verdict": verdict,
                "other sign": f"{row.result.opposite} of {row.n}" if known else "",
                "p": "" if not known or math.isnan(row.result.p) else f"{row.result.p:.3f}",
                "training time": "" if math.isnan(row.cost_a + row.cost_b) else f"{row.cost_a:.1f} : {row.cost_b:.1f}",
            }
        )
    return pd.DataFrame(rows)


def contrasts(frame: pd.DataFrame, plan: Mapping) -> pd.DataFrame:
    """The contrasts of a plan's questions, in its order.

    Columns: question, claim, contrast (its words), a, b (arms), n (replicates with both), planned, verdict, cost_a, cost_b
    (see `times`; nan where nobody has timed the plan), and result, a `statistics.Contrast`. While replicates are missing, and
    where an arm has no finished run, `verdict` says so and `result` is None: a verdict is given once, at the planned n.

    Args:
        frame: of `runs.load`.
        plan: the content of its YAML file, as `runs.plan` gives it; without questions the table is empty.
    """
    rows, cost = [], times(frame, plan)
    cost = cost.sum(axis=1, skipna=False) if "idle" in cost.attrs["measured"] else {}
    for name, question in plan.get("questions", {}).items():
        for words, (a, b) in question["contrasts"].items():
            pairs = _pairs(frame, a, b, plan)
            row = {"question": name, "claim": question["ask"], "contrast": words, "a": a, "b": b, "n": len(pairs)}
            row |= {"planned": len(plan.get("replicates", pairs)), "result": None}
            if missing := [arm for arm in (a, b) if arm not in set(frame.arm)]:
                row["verdict"] = f"no run of {' and '.join(missing)} is finished"
            elif row["n"] < row["planned"] or not row["n"]:
                row["verdict"] = f"{row['n']} of {row['planned']} replicates"
            else:
                count = len(question["contrasts"])
                row["result"] = contrast(pairs, plan["metric"], plan["epoch"], plan["smallest_difference"], count)
                row |= {"verdict": row["result"].verdict, "n": row["result"].n}
            rows.append(row | {"cost_a": cost.get(a, math.nan), "cost_b": cost.get(b, math.nan)})
    columns = ["question", "claim", "contrast", "a", "b", "n", "planned", "verdict", "result", "cost_a", "cost_b"]
    return pd.DataFrame(rows, columns=columns)


def contrast(pairs: pd.DataFrame, metric: str, epoch: str, smallest: float, contrasts: int = 1) -> Contrast:
    """The difference of two arms over replicates (`statistics`), from the runs' predictions.

    Replicates with one test split give an interval for other training and test images; with test splits of their own they are
    folds, of which the seeds are averaged. Of runs that kept no predictions of that epoch, the interval is for other training
    images only.

    Args:
        pairs: one row per replicate: the columns of `runs.load` of arm a, and those of b with the suffix `_b`.
    """
    try:
        scored = [(_scored(row.path, epoch), _scored(row.path_b, epoch)) for row in pairs.itertuples()]
        tested = [frozenset(a.ids) for a, _ in scored]
    except FileNotFoundError:
        scored, tested = None, list(pairs.fold)
        column = metric if epoch == "best" else f"{epoch}_{metric}"
        differences = (pairs[column] - pairs[f"{column}_b"]).to_numpy()
    if scored is not None:
        differences = np.array([weighted(metric, a)[0] - weighted(metric, b)[0] for a, b in scored])
    if len(pairs) == 1:
        return statistics.contrast(differences, None, smallest, contrasts)
    if len(set(tested)) > 1:
        number = {of: i for i, of in enumerate(dict.fromkeys(tested))}
        means = pd.Series(differences).groupby([number[of] for of in tested]).mean().to_numpy()
        images = Run(pairs.path.iloc[0]).metrics["images"]
        return statistics.contrast(means, statistics.folds(means, images["test"] / images["train"]), smallest, contrasts)
    variances, count = (0.0, 0.0), 2
    if scored is not None and np.abs(differences).max() > 1e-12:
        groups = _groups(pairs.path.iloc[0], scored[0][0])
        variances, count = _test_variances(pairs, scored, metric, epoch, groups), len(set(groups))
    return statistics.contrast(differences, statistics.crossed(differences, *variances, count), smallest, contrasts)


def accuracies(frame: pd.DataFrame, plan: Mapping | None = None) -> pd.DataFrame:
    """One row per arm: what it is, and its test scores in percent, mean ± 95 % t interval over replicates.

    The plan's metric (balanced accuracy without a plan) at the last epoch, at the one that validation chose, and by the moving
    average of the weights, where runs have one; accuracy on the training images without augmentation, marked where a network
    has not learned them; the lead of the teacher over the plain student, which the arm descends from by `like`; other metrics
    at the last epoch.
    """
    plan = plan or {}
    metric, rows = plan.get("metric", "balanced_accuracy"), []
    for name, group in frame.groupby("run", sort=False):
        first = group.iloc[0]
        learned = group.last_train_accuracy.mean()
        mark = "" if math.isnan(learned) else f"{100 * learned:.1f}" + (" (not learned)" if learned < LEARNED else "")
        teacher = _taught_by(plan, first.arm)
        has_average = f"ema_{metric}" in group and group[f"ema_{metric}"].notna().all()
        rows.append(
            {
                "arm": name,
                "network": first.student,
                "parameters": f"{first.parameters:,}",
                "pretrained": _pretrained(first.path),
                "teacher": title(teacher) if teacher else first.teacher,
                "teacher's lead": _lead(frame[frame.fraction == first.fraction], plan, first.arm, teacher, metric),
                "runs": len(group),
                f"{METRICS[metric]}, last epoch": str(interval(scores(group, metric, "last"))),
                f"epoch chosen on {SELECTION[first.selection]}": str(interval(scores(group, metric, "best"))),
                "moving average of the weights": str(interval(scores(group, metric, "ema"))) if has_average else "",
                "training images": mark,
                **{words: str(interval(scores(group, key))) for key, words in METRICS.items() if key != metric},
            }
        )
    table = pd.DataFrame(rows)
    optional = ("teacher's lead", "moving average of the weights", "training images")
    return table.drop(columns=[c for c in optional if not table[c].any()]).fillna("")


def changes(plan: Mapping) -> dict[str, tuple[str, str]]:
    """What every arm that is `like` another changes: {arm: (the other, "alpha 0.5 → 0.75")}."""
    arms, found = plan.get("runs", {}), {}
    for arm, own in arms.items():
        if "like" not in own:
            continue
        base = _merged(plan.get("parameters", {}), _resolved(arms, own["like"]))
        words = [f"taught by {_text(own['teacher'])}"] if "teacher" in own else []
        if "method" in own:
            words.append(f"method {own['method']}")
        for key, value in own.items():
            if key in ("like", "teacher", "method"):
                continue
            before = base.get(key, {}) if isinstance(value, Mapping) else base
            for option, new in (value if isinstance(value, Mapping) else {key: value}).items():
                old = None if "method" in own else before.get(option, _default(option, base.get("method", "Supervised")))
                if old != new:
                    words.append(f"{option.replace('_', ' ')} " + (f"{_text(old)} → " if old is not None else "") + _text(new))
        found[arm] = own["like"], ", ".join(words)
    return found


def ablations(frame: pd.DataFrame, plan: Mapping) -> pd.DataFrame:
    """One row per arm that is `like` another: what it changes, and what that changes, in numbers.

    A pair of arms that the plan's questions contrast has the interval of its question, as in `verdicts`; any other has one of
    its own, with 95 % (contrasts = 1). Columns: arm, like, change, n, question ("" where none asks), result
    (`statistics.Contrast` of arm - like, None while replicates are missing) and verdict (only where a question asks).
    """
    questions = {}
    for row in contrasts(frame, plan).itertuples():
        questions[row.a, row.b] = questions[row.b, row.a] = row
    rows = []
    for arm, (base, change) in changes(plan).items():
        row = {"arm": arm, "like": base, "change": change, "question": "", "verdict": "", "result": None}
        pairs = _pairs(frame, arm, base, plan)
        row["n"] = len(pairs)
        if of := questions.get((arm, base)):
            row |= {"question": of.question, "verdict": of.verdict, "result": of.result}
            if of.result and of.a != arm:  # the question asks the other way round
                row |= {"result": _turned(of.result), "verdict": f"{title(of.a)} {of.verdict}"}
        elif len(pairs) and len(pairs) == len(plan.get("replicates", pairs)):
            metric, epoch = plan.get("metric", "balanced_accuracy"), plan.get("epoch", "last")
            row["result"] = contrast(pairs, metric, epoch, plan.get("smallest_difference", 0.01))
        rows.append(row)
    columns = ["arm", "like", "change", "n", "question", "result", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `ablations` in percentage points."""
    return pd.DataFrame(
        {
            "arm": table.arm.map(title),
            "unlike": table.like.map(title),
            "change": table.change,
            "n": table.n,
            "difference": [r.text if r else "" for r in table.result],
            "verdict of the question": table.verdict,
        }
    )


def selection_bias(frame: pd.DataFrame, plan: Mapping) -> pd.DataFrame:
    """What the paper's protocol adds to a score: arms that chose their epoch on the test part beside the honest ones.

    Columns: arm, honest (the arm that it is `like`), and in percent the arm's score at the epoch chosen on the test part and at
    the last epoch, which nothing chose, the honest arm's score, and the paired difference to that with its 95 % t interval.
    """
    rows, metric = [], plan.get("metric", "balanced_accuracy")
    for arm, (base, _) in changes(plan).items():
        pairs = _pairs(frame, arm, base, plan)
        if not len(pairs) or {*pairs.selection} != {"test"} or {*pairs.selection_b} != {"validation"}:
            continue
        scores = {"chosen on test": metric, "last epoch": f"last_{metric}", "chosen on validation": f"{metric}_b"}
        row = {name: str(interval(pairs[column])) for name, column in scores.items()}
        rows.append({"arm": arm, "honest": base, **row, "difference": f"{interval(pairs[metric] - pairs[f'{metric}_b']):+}"})
    return pd.DataFrame(rows)


def predictions(frame: pd.DataFrame, epoch: str = "last") -> dict[str, list[Predictions]]:
    """What the runs of each arm predict for the test images, without those that are in the training part.

    Arms whose runs did not keep the predictions of that epoch are left out.
    """
    found = {}
    for name, group in frame.groupby("run", sort=False):
        with contextlib.suppress(FileNotFoundError):
            found[name] = [_scored(path, epoch) for path in group.path]
    return found


def recalls(predictions: Mapping[str, Sequence[Predictions]], classes: Sequence[str]) -> pd.DataFrame:
    """One row per arm and class: recall, and low and high of its 95 % interval, in [0, 1].

    Args:
        predictions: by arm, of every replicate. Each end of an interval is the farther one of Wilson's interval for other test
            images, which replicates share, and of the t interval over replicates, where there are several.
    """
    rows = [
        (arm, name, *_share([(one.predicted == c)[one.labels == c] for one in of]))
        for arm, of in predictions.items()
        for c, name in enumerate(classes)
    ]
    return pd.DataFrame(rows, columns=["arm", "class", "recall", "low", "high"])


@one_sentence
def detection(
    predictions: Mapping[str, Sequence[Predictions]], classes: Sequence[str], positive: Sequence[str]
) -> pd.DataFrame:
    """One row per arm: AUROC of the classes `positive` together (as of what is malignant) against all others, in percent.

    Args:
        predictions: by arm, of every replicate: mean ± 95 % t interval, for other training images but these test images.

    Raises:
        ValueError: an unknown class, or runs that keep the predicted class only.
    """
    if unknown := [name for name in positive if name not in classes]:
        raise ValueError(f"positive: no class {unknown[0]!r} here; there are {', '.join(classes)}")
    numbers = [list(classes).index(name) for name in positive]
    rows = {arm: str(interval([auroc_of(one, numbers) for one in of])) for arm, of in predictions.items()}
    return pd.DataFrame({f"AUROC of {', '.join(positive)}": rows}).rename_axis("arm")


def calibration(of: Sequence[Predictions], bins: int = 15) -> pd.DataFrame:
    """One row per bin of confidence that holds images: confidence (mean), share of all images, and accuracy with low and high.

    The bins are those of the ECE; all values are in [0, 1], intervals as in `recalls`.

    Args:
        of: predictions of every replicate of an arm.
    """
    number = [np.clip(np.ceil(one.confidence * bins), 1, bins) for one in of]
    confidence, every = np.concatenate([one.confidence for one in of]), np.concatenate(number)
    rows = [
        (
            confidence[every == i].mean(),
            (every == i).mean(),
            *_share([(p.predicted == p.labels)[n == i] for p, n in zip(of, number, strict=True)]),
        )
        for i in np.unique(every)
    ]
    return pd.DataFrame(rows, columns=["confidence", "share", "accuracy", "low", "high"])


def _share(right: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The share of images that are right, mean over the replicates that have images, and the ends of its 95 % interval."""
    right = [one for one in right if len(one)]
    if not right:
        return math.nan, math.nan, math.nan
    of = interval([one.mean() for one in right])
    low, high = statistics.wilson(of.mean, np.mean([len(one) for one in right]))
    low, high = np.nanmin([low, of.mean - of.half_width, of.mean]), np.nanmax([high, of.mean + of.half_width, of.mean])
    return of.mean, max(low, 0.0), min(high, 1.0)


def times(frame: pd.DataFrame, plan: Mapping) -> pd.DataFrame:
    """Training time by arm in units of the plain student's, from which it descends by `like`: own, and teacher (its teachers').

    From the steps of results/benchmarks/PLAN-steps.json (`make benchmark NAME=plan_steps`), timed on an idle machine; without
    it, or where images are made from the teacher, whose making then counts as the arm's own time, from the runs' own seconds,
    among which others ran. attrs["measured"] says which.
    """
    arms, made = plan.get("runs", {}), frame.get("synthesis_seconds", pd.Series(np.nan, frame.index))
    seconds = (frame.seconds + made.fillna(0)).groupby(frame.arm, sort=False).mean()
    file = runs.ROOT / "results" / "benchmarks" / f"{plan.get('name')}-steps.json"
    measured = "measured beside other runs"
    if file.exists() and made.isna().all():
        measured = "from steps on an idle machine"
        speed, epochs = json.loads(file.read_text())["images_per_second"], dict(frame.groupby("arm").epochs.first())
        planned = {arm: _merged(plan.get("parameters", {}), _resolved(arms, arm)).get("recipe", {}) for arm in arms}
        epochs = {arm: recipe["epochs"] for arm, recipe in planned.items() if "epochs" in recipe} | epochs
        seconds = {arm: count / speed[arm] for arm, count in epochs.items() if arm in speed}

    def teachers(arm: str) -> float:  # a teacher may have one, too
        teacher = _taught_by(plan, arm)
        return 0.0 if teacher is None else seconds.get(teacher, math.nan) + teachers(teacher)

    rows = {
        arm: {
            "own": seconds.get(arm, math.nan) / (unit := seconds.get(_root(arms, arm), math.nan)),
            "teacher": teachers(arm) / unit,
        }
        for arm in (arms or dict.fromkeys(frame.arm))
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.attrs["measured"] = measured
    return table


def provenance(frame: pd.DataFrame, plan: Mapping | None = None) -> str:
    """What the numbers are of: data, replicates, what the intervals hold for, and what is irregular about the runs."""
    plan = plan or {}
    first = frame.iloc[0]
    epochs = "/".join(map(str, sorted(frame.epochs.unique())))
    replicates = "; ".join(sorted(set(frame.replicate)))
    text = (
        f"{first.dataset} at {first.image_size} px, {first.protocol} split, replicates: {replicates}. "
        f"{epochs} epochs, {first.precision}. Test part, in percent; differences are paired by replicate."
    )
    if "patients" in frame and frame.patients.notna().all():
        text += f" Patients or other groups: {first.patients}."
    if frame.device.nunique() > 1:
        counted = [f"{device} ({n} run{'s' * (n > 1)})" for device, n in frame.device.value_counts().items()]
        text += f" Trained on {' and '.join(counted)}."
    if left_out := excluded(first):
        count = np.isin(Run(first.path).predictions().ids, list(left_out)).sum()
        text += f" {count} test images with a near-duplicate in the training part are left out."
    if plan.get("questions"):
        words = METRICS[plan["metric"]]
        text += (
            f" {words[0].upper()}{words[1:]} at the {plan['epoch']} epoch; intervals are simultaneous within a "
            f"question (95 %); smallest difference that matters: {100 * plan['smallest_difference']:g} points."
        )
    if changed := plan.get("questions_changed_after"):
        text += f" Questions changed after {changed} runs."
    if "mixed" in plan:
        text += f" Published in spite of: {'; '.join(plan['mixed'])}."
    return text


def excluded(data: Mapping) -> frozenset[str]:
    """Ids of the test images of a published split that occur, nearly, in its training part.

    Args:
        data: a run's `config["data"]`; in splits by group there are no such images.
    """
    file = Path(__file__).parent / "data" / "test_in_train" / f"{data['dataset']}.csv"
    return frozenset(pd.read_csv(file, dtype=str).id) if data["protocol"] == "official" and file.exists() else frozenset()


def title(arm: str) -> str:
    """An arm's name for readers: the methods as their papers write them."""
    words = {"hdkd": "HDKD", "cskd": "CSKD", "dearkd": "DearKD", "deit": "DeiT", "vit": "ViT", "mhca": "MHCA-ViT"}
    return " ".join(words.get(word, word) for word in arm.split("_"))


@one_sentence
def check_arms(arms: Sequence[str], frame: pd.DataFrame, plan: Mapping) -> None:
    """Whether the plan or its runs have all these arms.

    Raises:
        ValueError: one is unknown; the nearest is suggested.
    """
    known = list(plan.get("runs", {}) | dict.fromkeys(frame.arm))
    for arm in arms:
        if arm not in known:
            near = difflib.get_close_matches(arm, known, n=1)
            raise ValueError(
                f"no arm {arm!r} here; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")
            )


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table as a notebook shows it: no line breaks around "±"."""
    return table.map(lambda value: value.replace(" ± ", "\u00a0±\u00a0") if isinstance(value, str) else value)


def write(table: pd.DataFrame, path: str | Path, note: str) -> None:
    """The table as CSV, Markdown and LaTeX (booktabs) at `path` with these suffixes; `note` says what its numbers are of."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"), index=False)
    path.with_suffix(".md").write_text(f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n")
    latex = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    latex = latex.to_latex(hrules=True, column_format="l" * len(table.columns))
    for sign, macro in (("±", r"$\pm$"), ("→", r"$\to$"), ("Δ", r"$\Delta$"), ("×", r"$\times$")):
        latex = latex.replace(sign, macro)
    path.with_suffix(".tex").write_text(f"% {note}\n{latex}")


def write_all(frame: pd.DataFrame, plan: Mapping, folder: str | Path) -> None:
    """runs.csv (a row per run), and accuracies, verdicts and selection_bias where there are any (`write`), in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame.drop(columns="path").to_csv(folder / "runs.csv", index=False)
    note = provenance(frame, plan)
    write(accuracies(frame, plan), folder / "accuracies", note)
    for make in (verdicts, selection_bias):
        if len(table := make(frame, plan)):
            write(table, folder / make.__name__, note)


def metrics(measured: dict) -> pd.DataFrame:
    """The metrics of one run (`Run.metrics`): validation and test, of the best validation epoch and of the last."""
    columns = {
        f"{which} epoch, {part}": {title: measured[which][part][key] for key, title in METRICS.items()}
        for which in ("best", "last")
        for part in ("val", "test")
    }
    return pd.DataFrame(columns).map("{:.3f}".format)


def test_scores(trained: Mapping[str, Run]) -> pd.DataFrame:
    """The test metrics of several runs, one row each, at the epoch that each has chosen."""
    rows = {name: run.metrics["best"]["test"] for name, run in trained.items()}
    return pd.DataFrame(rows, index=list(METRICS)).T.rename(columns=METRICS).map("{:.3f}".format)


def _pairs(frame: pd.DataFrame, a: str, b: str, plan: Mapping) -> pd.DataFrame:
    """The replicates that have both arms: columns of a, and those of b with the suffix `_b`."""
    pairs = frame[frame.arm == a].merge(frame[frame.arm == b], on="replicate", suffixes=("", "_b"))
    planned = [", ".join(f"{key} {value}" for key, value in of.items()) for of in plan.get("replicates", [])]
    return pairs[pairs.replicate.isin(planned)].reset_index(drop=True) if planned else pairs


def _scored(path: str, epoch: str) -> Predictions:
    """A run's predictions in the order of ids, without the test images that are in the training part."""
    return _scored_once(path, epoch, Run(path).file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _scored_once(path: str, epoch: str, changed: int) -> Predictions:
    run = Run(path)
    of = run.predictions(epoch)
    order = np.argsort(of.ids, kind="stable")
    return of[order[~np.isin(of.ids[order], list(excluded(run.config["data"])))]]


def _groups(path: str, of: Predictions) -> np.ndarray:
    """The groups of test images that stay together, by the run's split; images by themselves where it names none."""
    split = Run(path).split
    if "group" not in split:
        return np.arange(len(of.ids))
    return split.set_index("id").group.reindex(of.ids).to_numpy(str)


def _test_variances(pairs: pd.DataFrame, scored: list, metric: str, epoch: str, groups: np.ndarray) -> tuple[float, float]:
    if metric == "accuracy":
        right = [[side.predicted == side.labels for side in pair] for pair in scored]
        return statistics.image_variances(np.array([a.astype(float) - b for a, b in right]), groups)
    a, b = ([_resampled(path, epoch, metric) for path in paths] for paths in (pairs.path, pairs.path_b))
    return statistics.resampled_variances(np.stack(a, 1) - np.stack(b, 1))


def _resampled(path: str, epoch: str, metric: str) -> np.ndarray:
    """(RESAMPLES,) values of a run's metric when groups of test images are drawn anew, the same for all runs of a test part."""
    return _resampled_once(path, epoch, metric, Run(path).file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)  # a run may be in several contrasts, and a contrast in tables and figures
def _resampled_once(path: str, epoch: str, metric: str, changed: int) -> np.ndarray:
    of = _scored(path, epoch)
    names, number = np.unique(_groups(path, of), return_inverse=True)
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    return weighted(metric, of, counts[:, number])


def scores(frame: pd.DataFrame, metric: str, epoch: str = "last") -> pd.Series:
    """A test metric of every run of one data set, in [0, 1], without the test images that are in the training part.

    Of runs that keep only predicted classes a metric of probabilities (macro AUROC) is that of all test images.
    """
    measured = frame[metric if epoch == "best" else f"{epoch}_{metric}"]
    if not len(frame) or not excluded(frame.iloc[0]):
        return measured
    try:
        return pd.Series([weighted(metric, _scored(path, epoch))[0] for path in frame.path], frame.index)
    except ValueError:
        return measured


def _lead(frame: pd.DataFrame, plan: Mapping, arm: str, teacher: str | None, metric: str) -> str:
    if teacher is None:
        return ""
    student = _root(plan["runs"], arm)
    both = frame[frame.arm.isin([teacher, student])]
    pairs = _pairs(both.assign(score=scores(both, metric)), teacher, student, plan)
    return f"{interval(pairs.score - pairs.score_b):+}" if len(pairs) else ""


def _pretrained(path: str) -> str:
    method = Run(path).config["method"]
    return ", ".join(who for who in ("student", "teacher") if method.get(who, {}).get("pretrained")) or "no"


def _root(arms: Mapping, arm: str) -> str:
    while "like" in arms.get(arm, {}):
        arm = arms[arm]["like"]
    return arm


def _taught_by(plan: Mapping, arm: str) -> str | None:
    """The arm that teaches this one; a pretrained network, which a dict names, is none."""
    teacher = _resolved(plan["runs"], arm).get("teacher") if arm in plan.get("runs", {}) else None
    return teacher if isinstance(teacher, str) else None


def _resolved(arms: Mapping, arm: str) -> dict:
    """An arm with what it takes from those that it is `like`."""
    own = {key: value for key, value in arms[arm].items() if key != "like"}
    if "like" not in arms[arm]:
        return own
    return _merged(_resolved(arms, arms[arm]["like"]), own)


def _merged(base: Mapping, own: Mapping) -> dict:
    """As `study._merge`; a teacher is replaced."""
    both = base.keys() & own.keys() - {"teacher"}
    both = {key for key in both if isinstance(base[key], Mapping) and isinstance(own[key], Mapping)}
    return {**base, **own, **{key: {**base[key], **own[key]} for key in both}}


def _default(option: str, method: str) -> object:
    """The default of a method's option or of a recipe's field; None where neither has it, or the method is not installed."""
    known = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    with contextlib.suppress(ValueError):
        known |= {key: p.default for key, p in inspect.signature(methods.find(method)).parameters.items()}
    value = known.get(option)
    return None if value is inspect.Parameter.empty else value


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(of)}" for key, of in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " and ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _turned(result: Contrast) -> Contrast:
    return replace(result, mean=-result.mean, differences=tuple(-d for d in result.differences))
