"""Figures, all in one style. Each function draws on axes of its own and returns the figure, which pyplot does not keep.

A method has one colour and one marker everywhere (`STYLES`). Figures are at most `WIDTH` inches wide and no text is smaller
than `SMALL` points, which is ten pixels on a page of 830.
"""

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

from hdkd_lib import tables
from hdkd_lib.metrics import Predictions, weighted
from hdkd_lib.statistics import interval
from hdkd_lib.tables import METRICS, title

# By the first word of an arm's name: colour (at least 3:1 against white) and marker. The marker tells them apart in grey.
STYLES = {
    "teacher": ("#1a1a1a", "s"),
    "student": ("#0072b2", "o"),
    "hdkd": ("#d55e00", "^"),
    "vit": ("#5b8c00", "D"),
    "deit": ("#8a2be2", "v"),
    "cskd": ("#c2185b", "P"),
    "mhca": ("#00868b", "X"),
    "dearkd": ("#5d2e0c", "*"),
    "data": ("#7a7a7a", "h"),
}
SPARE = (("#3f51b5", "<"), ("#a0740b", ">"), ("#2e6b34", "p"), ("#b23a3a", "d"), ("#555f8a", "H"), ("#8f4f8f", "8"))
PALETTE = [color for color, _ in STYLES.values() if color != STYLES["teacher"][0]]
WIDTH, SMALL = 10.0, 9
WRONG = "#b00020"
DASHES = ("--", ":", "-.", (0, (6, 2)))  # of classifiers that train no network


def styles(arms: Sequence[str]) -> dict[str, dict]:
    """Colour and marker of every arm, by its method; further arms of one method are hollow, then half filled."""
    found, used, spare = {}, {}, iter(SPARE * len(arms))
    for arm in dict.fromkeys(arms):
        words = arm.lower().replace("-", "_").split("_")
        key = {"alone": "student", "synthetic": "data"}.get(first := words[0].split(" ")[0], first)
        if key not in used:
            used[key] = [*(STYLES[key] if key in STYLES else next(spare)), 0]
        color, marker, count = used[key]
        used[key][2] += 1
        found[arm] = {"color": color, "marker": marker, "fillstyle": ("full", "none", "left", "right")[count % 4]}
    return found


def set_style() -> None:
    """The study's style; call once at the top of a notebook."""
    plt.style.use(["seaborn-v0_8-whitegrid", "seaborn-v0_8-notebook"])
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.title_fontsize"), 10.8),
            **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9.9),
            "figure.figsize": (6.4, 4.8),
            "axes.linewidth": 1.25,
            "legend.frameon": True,
            "lines.linewidth": 1.5,
            "lines.markersize": 6.0,
            "lines.markeredgewidth": 1.0,
            "patch.edgecolor": "white",
            "patch.force_edgecolor": True,
            "patch.linewidth": 1.0,
            **dict.fromkeys(("xtick.bottom", "ytick.left"), False),
            **dict.fromkeys(("xtick.major.pad", "ytick.major.pad"), 3.5),
            "figure.dpi": 80,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.fontsize": SMALL,
            "pdf.fonttype": 42,  # text stays text
        }
    )
    if (shell := get_ipython()) is not None:
        plt.close(plt.figure())  # Jupyter's backend registers its own way of showing figures with the first of them
        shell.display_formatter.formatters["image/png"].for_type(Figure, _described_png)


def _described_png(figure: Figure) -> tuple[bytes, dict]:
    """What Jupyter shows: the image, and in its metadata the words for those who do not see it."""
    return _light_png(figure), {"alt": figure.get_label()}


def _light_png(figure: Figure, dpi: float | None = None) -> bytes:
    """A third of the usual bytes, by 256 colours: figures are committed."""
    whole, light, dpi = io.BytesIO(), io.BytesIO(), dpi or figure.dpi
    figure.savefig(whole, format="png", dpi=dpi, bbox_inches="tight")
    few = Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(light, format="png", optimize=True, dpi=(dpi, dpi))
    return light.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG at 200 dpi, and as PDF beside it, and makes their folder; equal figures give equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_light_png(figure, plt.rcParams["savefig.dpi"]))
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return path


def contact_sheet(images: Tensor, labels: Tensor, classes: Sequence[str], per_class: int = 6) -> Figure:
    """The first `per_class` images (N, 3, S, S; uint8, or float in [0, 1]) of every class, one column per class."""
    columns = len(classes)
    size = (1.15 * columns, 1.15 * per_class + 0.3)
    alt = f"Images of each class, one column per class: {_listed(classes)}."
    figure, axes = _subplots(per_class, columns, figsize=size, squeeze=False, alt=alt)
    for c, name in enumerate(classes):
        chosen = images[labels == c][:per_class]
        for row, axis in enumerate(axes[:, c]):
            axis.axis("off")
            if row < len(chosen):
                axis.imshow(chosen[row].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes[0, c].set_title(str(name).replace("_", "\n"), fontsize=SMALL)
    return figure


def image_grid(rows: Mapping[str, Tensor]) -> Figure:
    """One row of images per entry, (N, 3, S, S) uint8 or float in [0, 1]."""
    import seaborn as sns  # takes seconds

    count = max(len(images) for images in rows.values())
    size, alt = (1.15 * count + 0.8, 1.2 * len(rows)), f"Images in {len(rows)} rows: {_listed(rows)}."
    figure, axes = _subplots(len(rows), count, figsize=size, squeeze=False, alt=alt)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            sns.despine(ax=axis, left=True, bottom=True)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def duplicate_pairs(pairs: pd.DataFrame, ids: Sequence[str], images: Tensor, count: int = 8) -> Figure:
    """The worst `count` pairs of `leakage.Audit.pairs`: two labels first, then two parts, then the least alike.

    Args:
        ids, images: of the whole set, N names and (N, 3, S, S) uint8.
    """
    number = {name: i for i, name in enumerate(ids)}
    worst = pairs.sort_values(["is_conflict", "is_crossing", "ratio"], ascending=False, kind="stable").head(count)
    size, alt = (
        (1.5 * max(4, len(worst)), 4 if len(worst) else 0.6),
        f"{len(worst)} pairs of duplicate images, one above the other.",
    )
    figure, axes = _subplots(2, max(1, len(worst)), figsize=size, squeeze=False, alt=alt)
    for axis in axes.flat:
        axis.axis("off")
    if not len(worst):
        axes[0, 0].text(0, 0.5, "no duplicates found")
    for column, pair in zip(axes.T, worst.itertuples(), strict=False):
        for axis, side in zip(column, "ab", strict=True):
            axis.imshow(images[number[getattr(pair, side)]].permute(1, 2, 0).numpy(), interpolation="nearest")
            title = f"{getattr(pair, f'part_{side}')}\n{getattr(pair, f'label_{side}')}".strip().replace("_", " ")
            axis.set_title(title, fontsize=SMALL, color="C3" if pair.is_conflict else "black")
        place = {"transform": column[1].transAxes, "ha": "center", "va": "top"}
        column[1].text(0.5, -0.04, f"{pair.match}, ratio {pair.ratio:.2f}", fontsize=SMALL, **place)
    return figure


def leakage_gain(scores: pd.DataFrame) -> Figure:
    """Scores of `leakage.leakage_gain` by protocol: every fold, and the mean with its 95 % interval."""
    import seaborn as sns  # takes seconds

    names = list(scores.classifier.unique())
    alt = f"Balanced accuracy of {_listed(names)} by protocol: {_listed(scores.protocol.unique())}."
    figure, axes = _subplots(1, len(names), figsize=(3.2 * len(names), 3), sharey=True, squeeze=False, alt=alt)
    for axis, name in zip(axes[0], names, strict=True):
        own = scores[scores.classifier == name]
        sns.stripplot(own, x="protocol", y="balanced_accuracy", hue="protocol", alpha=0.5, jitter=False, ax=axis)
        for x, (_, group) in enumerate(own.groupby("protocol", sort=False)):
            estimate = interval(group.balanced_accuracy)
            half = 0 if np.isnan(estimate.half_width) else estimate.half_width
            axis.errorbar(x + 0.2, estimate.mean, half, fmt="o", color="black", capsize=3, markersize=4)
        axis.set(title=name, xlabel="", ylabel="balanced accuracy")
    return figure


def architecture(networks: Mapping[str, Sequence[dict]], links: Mapping[tuple[str, str], str]) -> Figure:
    """Two networks as rows of boxes, as high as their maps are wide, each with output shape, parameters and GFLOPs.

    Args:
        networks: name and `models.module_summary` of the upper and of the lower network.
        links: (part above, part below) and what is written on the arrow between them.
    """
    columns = max(len(parts) for parts in networks.values())
    alt = f"Two networks as rows of boxes: {_listed(networks)}; arrows from the first to the second: {_listed(links.values())}."
    figure, axis = _subplots(figsize=(1.3 * columns + 1, 4.8), alt=alt)
    axis.set(xlim=(-1, columns - 0.6), ylim=(-3.7, 1.6))
    axis.axis("off")
    largest = max(part["shape"][-1] for parts in networks.values() for part in parts if len(part["shape"]) == 3)
    boxes = {}
    for row, (name, parts) in enumerate(networks.items()):
        y, below = -2.2 * row, row > 0
        axis.text(-1, y, name, va="center", weight="bold")
        for x, part in enumerate(parts):
            kind = len(part["shape"])  # 3: maps, 2: tokens, 1: a vector
            height = 1.2 * (part["shape"][-1] / largest) ** 0.5 if kind == 3 else (0, 0.35, 0.5)[kind]
            axis.add_patch(plt.Rectangle((x - 0.3, y - height / 2), 0.6, height, color=PALETTE[3 - kind], alpha=0.6, lw=0))
            boxes[row, part["name"]] = x, y + (height if below else -height) / 2
            shape = "{}×{}×{}".format(*part["shape"]) if kind == 3 else " × ".join(map(str, part["shape"]))
            gflops = f"{part['gflops']:.2g} GFLOPs" if part["gflops"] >= 1e-3 else "< 0.001 GFLOPs"
            label = f"{shape}\n{part['parameters']:,} par.\n{gflops}"
            axis.text(x, y, part["name"].replace("_", "\n"), ha="center", va="center", fontsize=SMALL)
            place = {"va": "top" if below else "bottom", "ha": "center", "fontsize": SMALL, "color": "0.3"}
            axis.text(x, y - 0.68 if below else y + 0.68, label, **place)
            if x and (kind > 1 or part["shape"] != parts[x - 1]["shape"]):  # two heads stand side by side
                axis.annotate("", (x - 0.32, y), (x - 0.68, y), arrowprops={"arrowstyle": "->", "color": "0.6"})
    for (above, below), text in links.items():
        start, end = boxes[0, above], boxes[1, below]
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": PALETTE[3], "lw": 1.5, "ls": "--"})
        middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        axis.text(*middle, text, color=PALETTE[3], fontsize=SMALL, ha="center", va="center", backgroundcolor="white")
    return figure


def overlays(
    images: Tensor,
    maps: Mapping[str, Tensor],
    labels: Tensor,
    classes: Sequence[str],
    predicted: Mapping[str, Tensor],
    limits: tuple[float, float] | None = None,
) -> Figure:
    """The images (N, 3, H, W; uint8, or float in [0, 1]), and below them every entry's maps (N, h, w) laid over them.

    Args:
        labels, classes: true classes (N,) of the images, named above them.
        predicted: classes (N,) that the network of an entry predicts, named above its maps; red where that is wrong.
        limits: values of the darkest and the brightest colour, with a scale beside; None: each map's own extremes.
    """
    low, high = limits or (None, None)
    count, names = len(images), [str(name).replace("_", "\n") for name in classes]
    size = (1.2 * count + 1, 1.5 * (1 + len(maps)))
    alt = f"Images, and laid over them maps of {_listed(maps)}, with true and predicted classes."
    figure, axes = _subplots(1 + len(maps), count, figsize=size, squeeze=False, alt=alt)
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    height, width = pictures.shape[1:3]
    for line, (name, values) in zip(axes, {"image": None, **maps}.items(), strict=True):
        for i, axis in enumerate(line):
            axis.imshow(pictures[i], interpolation="nearest", extent=(0, width, height, 0))
            if values is not None:
                over = {"cmap": "inferno", "alpha": 0.6, "interpolation": "nearest", "extent": (0, width, height, 0)}
                axis.imshow(values[i].cpu().numpy(), vmin=low, vmax=high, **over)
                color = "black" if predicted[name][i] == labels[i] else WRONG
                axis.set_title(f"predicted {names[predicted[name][i]]}", fontsize=SMALL, color=color)
            else:
                axis.set_title(f"class {names[labels[i]]}", fontsize=SMALL)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    if limits:
        shown = plt.cm.ScalarMappable(plt.Normalize(low, high), "inferno")
        figure.colorbar(shown, ax=axes[1:], shrink=0.8, aspect=12 * len(maps))
    return figure


def class_counts(parts: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Images per class in each part of a split; `parts` holds label tensors."""
    import seaborn as sns  # takes seconds

    rows = [(part, classes[c], int((labels == c).sum())) for part, labels in parts.items() for c in range(len(classes))]
    alt = f"Images of each class in {_listed(parts)}; classes: {_listed(classes)}."
    figure, axis = _subplots(figsize=(max(5, 0.9 * len(classes) + 2), 3), alt=alt)
    sns.barplot(pd.DataFrame(rows, columns=["part", "class", "images"]), x="class", y="images", hue="part", ax=axis)
    _name_classes(axis, range(len(classes)), classes)
    axis.set_xlabel("")
    sns.move_legend(axis, "lower center", bbox_to_anchor=(0.5, 1), ncol=len(parts), title=None, frameon=False)
    return figure


def curves(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss (divided by its first value), validation cross-entropy and balanced accuracy by epoch."""
    alt = f"Training loss, validation cross-entropy and validation balanced accuracy by epoch: {_listed(histories)}."
    figure, axes = _subplots(1, 3, figsize=(10, 3.1), alt=alt)
    styled = styles(list(histories))
    for i, (name, history) in enumerate(histories.items()):
        style = {"label": name, "linestyle": ("-", "--", "-.", ":")[i % 4]}  # one may lie on another
        style |= styled[name] | {"markevery": max(1, len(history) // 6), "ms": 5}
        axes[0].plot(history.epoch + 1, history.train_loss / history.train_loss.iloc[0], **style)
        axes[1].plot(history.epoch + 1, history.val_nll, **style)
        axes[2].plot(history.epoch + 1, 100 * history.val_balanced_accuracy, **style)
    shown = ("training loss / first epoch's", "validation cross-entropy", "validation balanced accuracy (%)")
    for axis, words in zip(axes, shown, strict=True):
        axis.set(xlabel="epoch")
        axis.set_title(words, fontsize=SMALL + 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[2].set_ylim(top=100)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=6)
    return figure


def loss_terms(history: pd.DataFrame, terms: Mapping[str, str], yscale: str = "log") -> Figure:
    """Terms of a method's loss by epoch, each under its equation.

    Args:
        terms: column of the history without its prefix `train_`, and the equation in TeX.
    """
    alt = f"By epoch: {_listed(term.replace('_', ' ') for term in terms)}."
    figure, axes = _subplots(1, len(terms), figsize=(4.6 * len(terms), 3), squeeze=False, alt=alt)
    for axis, color, (term, equation) in zip(axes[0], _cycle(), terms.items(), strict=False):
        axis.plot(history.epoch + 1, history[f"train_{term}"], color=color)
        axis.set(title=equation, xlabel="epoch", ylabel=term.replace("_", " "))
        if yscale == "log":
            _log_scale(axis)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def agreement(scores: Mapping[str, Sequence[float]], stages: Sequence[str]) -> Figure:
    """Feature agreement with the teacher (linear CKA) by stage, a bar per student; further arms of one method are hatched."""
    import seaborn as sns  # takes seconds

    rows = [(stage, name, value) for name, values in scores.items() for stage, value in zip(stages, values, strict=True)]
    alt = f"Linear CKA with the teacher's features at {_listed(stages)}: {_listed(scores)}."
    figure, axis = _subplots(figsize=(5.5, 3), alt=alt)
    styled = styles(list(scores))
    table = pd.DataFrame(rows, columns=["stage", "student", "CKA"])
    sns.barplot(table, x="stage", y="CKA", hue="student", palette={name: of["color"] for name, of in styled.items()}, ax=axis)
    axis.set(ylim=(0, 1), ylabel="linear CKA with the teacher", xlabel="")
    sns.move_legend(axis, "lower center", bbox_to_anchor=(0.5, 1), ncol=len(scores), title=None, frameon=False)
    for style, bars, patch in zip(styled.values(), axis.containers, axis.get_legend().get_patches(), strict=True):
        for bar in (*bars, patch):
            bar.set_hatch("" if style["fillstyle"] == "full" else "////")
    return figure


def comparison(
    frame: pd.DataFrame,
    metrics: Sequence[str] = ("balanced_accuracy", "accuracy", "macro_auroc"),
    baselines: pd.DataFrame | None = None,
) -> Figure:
    """Test metrics by arm at the last epoch: an open mark per replicate, its runs joined, mean and 95 % t interval in black.

    Args:
        frame: of `runs.load`.
        baselines: of `baselines.measure`: their means are dashed lines.
    """
    names = list(dict.fromkeys(frame.run))
    styled = styles(names)
    if baselines is not None:
        baselines = baselines[baselines.replicate.isin(frame.replicate)]
    size = (WIDTH, max(3.2, 0.3 * len(names) + 1.2))
    alt = f"{_listed(METRICS[metric] for metric in metrics)} of every replicate, with intervals: {_listed(map(title, names))}."
    figure, axes = _subplots(1, len(metrics), figsize=size, squeeze=False, sharey=True, alt=alt)
    for axis, metric in zip(axes[0], metrics, strict=True):
        values = frame.assign(score=100 * tables.scores(frame, metric))
        for _, replicate in values.groupby("replicate"):
            own = replicate.set_index("run").score.reindex(names)
            axis.plot(own, range(len(names)), "-", color="0.85", lw=0.8, zorder=1)
        for y, name in enumerate(names):
            scores, style = values[values.run == name].score, styled[name] | {"fillstyle": "none"}
            axis.plot(scores, [y] * len(scores), ls="", ms=6, **style, zorder=2)
            estimate = interval(scores)
            half = None if np.isnan(estimate.half_width) else estimate.half_width
            axis.errorbar(estimate.mean, y + 0.25, xerr=half, fmt="|", color="black", ms=8, capsize=2, zorder=3)
        low, high = axis.get_xlim()  # an interval of few runs may reach beyond what the metric can be
        if baselines is not None and metric in baselines:
            for dashes, (words, score) in zip(
                DASHES, baselines.groupby("classifier", sort=False)[metric].mean().items(), strict=False
            ):
                axis.axvline(100 * score, color="0.45", lw=1, ls=dashes, label=f"{words}: {100 * score:.1f} %", zorder=0)
        axis.set(xlabel=f"{METRICS[metric]} (%)", xlim=(max(low, 0), min(high, 101)))
        _arrows(axis, [(interval(values[values.run == name].score), y + 0.25) for y, name in enumerate(names)])
    axes[0, 0].set_yticks(range(len(names)), [title(name) for name in names])
    axes[0, 0].invert_yaxis()
    count = frame.groupby("run").size()
    runs = f"{count.min()}" if count.min() == count.max() else f"{count.min()} to {count.max()}"
    if baselines is not None:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    figure.suptitle(f"test images, last epoch; {runs} replicates", fontsize=SMALL + 1)
    return figure


def contrasts(table: pd.DataFrame, smallest: float = 0.0, metric: str = "") -> Figure:
    """Differences of two arms in percentage points: every replicate an open mark, the mean with its interval, the verdict.

    Args:
        table: of `tables.contrasts`, or of `tables.ablations`.
        smallest: the smallest difference that matters, a grey band.
        metric: what differs, for the axis, such as "accuracy at the last epoch".
    """
    is_asked = "claim" in table
    labels = [
        f"{title(row.a)} \N{MINUS SIGN} {title(row.b)}" if is_asked else f"{title(row.arm)}: {row.change}"
        for row in table.itertuples()
    ]
    styled = styles([row.a if is_asked else row.arm for row in table.itertuples()])
    ends = [100 * (abs(r.mean) + (0 if np.isnan(r.half_width) else r.half_width)) for r in table.result if r]
    each = [100 * abs(d) for r in table.result if r for d in r.differences]
    limit = max([2.5 * np.median(ends), *each, 200 * smallest], default=1.0) if ends else max(200 * smallest, 1.0)
    limit = 1.1 * min(limit, max([*ends, *each, 200 * smallest], default=limit))
    alt = f"Differences of two arms in percentage points, with intervals: {_listed(label.split(':')[0] for label in labels)}."
    labels = [textwrap.fill(label, 44) for label in labels]  # long ones would leave no room for the marks
    height = max(0.36, 0.16 * max((label.count("\n") + 1 for label in labels), default=1))
    figure, axis = _subplots(figsize=(WIDTH, height * len(table) + 1.2), alt=alt)
    axis.axvspan(-100 * smallest, 100 * smallest, color="0.92", zorder=0, lw=0)
    axis.axvline(0, color="0.4", lw=1, zorder=1)
    marked = []
    for y, row in enumerate(table.itertuples()):
        text = row.verdict if isinstance(row.verdict, str) else ""
        if row.result:
            style = styled[row.a if is_asked else row.arm]
            axis.plot(
                [100 * d for d in row.result.differences], [y] * row.result.n, ls="", ms=6, **style | {"fillstyle": "none"}
            )
            half = None if np.isnan(row.result.half_width) else 100 * row.result.half_width
            axis.errorbar(100 * row.result.mean, y, xerr=half, fmt="|", color="black", ms=10, capsize=3, lw=1.5, zorder=3)
            marked.append((replace(row.result, mean=100 * row.result.mean, half_width=100 * row.result.half_width), y))
            text = textwrap.fill(", ".join(filter(None, [row.result.text, text, f"n = {row.result.n}"])), 48)
        axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL)
    axis.set(xlim=(-limit, limit), ylim=(len(table) - 0.5, -0.5))
    _arrows(axis, marked)
    axis.set_yticks(range(len(table)), labels, fontsize=SMALL)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(
        f"difference{f' of {metric}' * bool(metric)} (percentage points); grey: too small to matter"
        if smallest
        else f"difference{f' of {metric}' * bool(metric)} (percentage points)"
    )
    return figure


def training_time(frame: pd.DataFrame, plan: Mapping, metric: str = "balanced_accuracy") -> Figure:
    """A test metric at the last epoch against training time in units of the plain student's (`tables.times`).

    A grey line is the teacher's own training, which comes before; the mark stands where both end, with a 95 % t interval.
    """
    times = tables.times(frame, plan)
    styled = styles(list(times.index))
    alt = f"{METRICS[metric]} against training time: {_listed(map(title, times.index))}."
    figure, axis = _subplots(figsize=(8, 4.2), alt=alt)
    for arm, row in times[times.index.isin(frame.arm)].iterrows():
        estimate = interval(100 * tables.scores(frame[frame.arm == arm], metric))
        half = None if np.isnan(estimate.half_width) else estimate.half_width
        axis.plot([row.own, row.own + row.teacher], [estimate.mean] * 2, color="0.7", lw=2, zorder=1)
        axis.errorbar(
            row.own + row.teacher, estimate.mean, half, ls="", ms=8, capsize=3, label=title(arm), zorder=2, **styled[arm]
        )
    measured = times.attrs["measured"]
    axis.set(xlabel=f"training time / the plain student's ({measured}); grey: its teacher's", ylabel=f"{METRICS[metric]} (%)")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    figure.legend(loc="outside right center")
    return figure


def schedules(weights: Mapping[str, Callable[[float], float]], chosen: str) -> Figure:
    """A weight over the progress of training, by name of its schedule; the chosen one is thick."""
    alt = f"Weight of the local responses over training, by schedule: {_listed(weights)}; chosen: {chosen}."
    figure, axis = _subplots(figsize=(4.5, 2.6), alt=alt)
    progress = np.linspace(0, 1, 101)
    for name, weight in weights.items():
        axis.plot(progress, [weight(t) for t in progress], lw=3 if name == chosen else 1, label=name)
    axis.set(xlabel="progress of training", ylabel="weight of the local responses")
    axis.legend(fontsize=SMALL)
    return figure


def attention_distances(distances: Mapping[str, Tensor]) -> Figure:
    """Mean attention distance of every head (blocks, heads) by block: a dot per head, a line through the blocks' means."""
    alt = f"Mean attention distance of every head by block: {_listed(distances)}."
    figure, axis = _subplots(figsize=(5.5, 3.2), alt=alt)
    styled = styles(list(distances))
    for i, (name, values) in enumerate(distances.items()):
        blocks = np.arange(1, len(values) + 1) + 0.08 * (i - (len(distances) - 1) / 2)
        axis.plot(blocks, values.mean(1), label=name, **styled[name])
        axis.scatter(blocks.repeat(values.shape[1]), values.flatten(), s=14, color=styled[name]["color"], alpha=0.5)
    axis.set(xlabel="block", ylabel="mean attention distance (pixels)")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure


def heatmaps(rows: Mapping[str, Tensor], each: str = "map") -> Figure:
    """One row of maps (N, h, w) per entry, each in colours from its own lowest to its own highest value.

    Args:
        each: what one map is of, such as "head", for the titles.
    """
    count = max(len(maps) for maps in rows.values())
    size, alt = (1.15 * count + 1.6, 1.2 * len(rows)), f"Maps of every {each}: {_listed(rows)}."
    figure, axes = _subplots(len(rows), count, figsize=size, squeeze=False, alt=alt)
    for line, (name, maps) in zip(axes, rows.items(), strict=True):
        for axis, values in zip(line, maps, strict=False):
            axis.imshow(values.cpu().numpy(), cmap="inferno")
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for i, axis in enumerate(axes[0]):
        axis.set_title(f"{each} {i}", fontsize=SMALL)
    return figure


def layer_gaps(gaps: Mapping[str, Sequence[Mapping]]) -> Figure:
    """How far images are from what every batch norm remembers, by `inversion.statistics_gap`: means and variances, by layer."""
    alt = f"Distance of means and variances from what each batch norm remembers, by layer: {_listed(gaps)}."
    figure, axes = _subplots(1, 2, figsize=(10, 3), alt=alt)
    styled = styles(list(gaps))
    for axis, statistic, label in zip(
        axes, ("mean", "var"), ("means: RMS difference / running std", "variances: mean |log ratio|"), strict=True
    ):
        for name, rows in gaps.items():
            axis.plot(range(1, len(rows) + 1), [row[statistic] for row in rows], ms=4, label=name, **styled[name])
        axis.set(xlabel="batch norm, from first to last", title=label)
        _log_scale(axis)
    axes[0].legend()
    return figure


def efficiency(frame: pd.DataFrame, metric: str = "balanced_accuracy", baselines: pd.DataFrame | None = None) -> Figure:
    """A test metric at the last epoch by the share of the training images, per arm: every replicate, means, 95 % t intervals.

    Args:
        frame: of `runs.load`.
        baselines: of `baselines.measure`: dashed lines through their means.
    """
    arms, values = list(dict.fromkeys(frame.arm)), frame.assign(score=100 * tables.scores(frame, metric))
    alt = f"{METRICS[metric]} by the share of the training images: {_listed(map(title, arms))}."
    figure, axis = _subplots(figsize=(8, 4), alt=alt)
    styled, marked = styles(arms), []
    for i, arm in enumerate(arms):
        own, shift = values[values.arm == arm], 1.03 ** (i - (len(arms) - 1) / 2)
        estimates = {share: interval(group) for share, group in own.groupby("fraction").score}
        places = [100 * share * shift for share in estimates]
        axis.plot(100 * own.fraction * shift, own.score, ls="", ms=4, alpha=0.6, **styled[arm] | {"fillstyle": "none"})
        half = [0 if np.isnan(e.half_width) else e.half_width for e in estimates.values()]
        axis.errorbar(places, [e.mean for e in estimates.values()], half, ms=6, capsize=3, label=title(arm), **styled[arm])
        marked += list(zip(estimates.values(), places, strict=True))
    axis.set(xscale="log", xlabel="training images (%)", ylabel=f"{METRICS[metric]} (%)")
    ticks = sorted(100 * frame.fraction.unique())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    low, high = values.score.min(), values.score.max()
    if baselines is not None and metric in baselines:
        share = baselines.replicate.map(frame.drop_duplicates("replicate").set_index("replicate").fraction)
        for dashes, (words, scores) in zip(
            DASHES, baselines.assign(share=share).groupby("classifier", sort=False), strict=False
        ):
            scores = 100 * scores.groupby("share")[metric].mean()
            axis.plot(100 * scores.index, scores, color="0.45", lw=1, ls=dashes, label=words, zorder=0)
    axis.set_ylim(max(low - 0.3 * (high - low) - 1, 0), min(high + 0.3 * (high - low) + 1, 101))
    _arrows(axis, marked, vertical=True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


def mean_curves(histories: Mapping[str, Sequence[pd.DataFrame]], column: str = "val_balanced_accuracy") -> Figure:
    """A history column in percent by epoch: every replicate thin, the mean of each arm thick."""
    alt = f"{column.replace('val_', 'validation ')} by epoch, every replicate and the means: {_listed(map(title, histories))}."
    figure, axis = _subplots(figsize=(8, 3.6), alt=alt)
    styled = styles(list(histories))
    for name, replicates in histories.items():
        for history in replicates:
            axis.plot(history.epoch + 1, 100 * history[column], color=styled[name]["color"], lw=0.4, alpha=0.3)
        mean = pd.concat(replicates).groupby("epoch")[column].mean()
        style = {"lw": 1.5, "ms": 5, "markevery": max(1, len(mean) // 6), **styled[name]}
        axis.plot(mean.index + 1, 100 * mean, label=f"{title(name)} (mean of {len(replicates)})", **style)
    axis.set(xlabel="epoch", ylabel=f"{column.replace('val_', 'validation ').replace('_', ' ')} (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center")
    return figure


def confusions(matrices: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str]) -> Figure:
    """Confusion matrices: percent of the true class in the cells; the title says how many images they sum.

    More than 12 classes are drawn without numbers, and more than 30 without names.
    """
    import seaborn as sns  # takes seconds

    is_few = len(classes) <= 12
    names = [str(name).replace("_", "\n") for name in classes] if len(classes) <= 30 else False
    columns = min(3, len(matrices)) if len(classes) <= 12 else min(2, len(matrices))
    rows, size = -(-len(matrices) // columns), min(WIDTH / columns, max(3.2, 0.4 * len(classes) + 1))
    alt = f"Confusion matrices in percent of the true class: {_listed(map(title, matrices))}."
    figure, axes = _subplots(rows, columns, figsize=(size * columns, (size + 0.3) * rows), squeeze=False, alt=alt)
    for axis in axes.flat[len(matrices) :]:
        axis.axis("off")
    for i, (axis, (name, counts)) in enumerate(zip(axes.flat, matrices.items(), strict=False)):
        counts = np.asarray(counts)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        sns.heatmap(
            share, annot=100 * share if is_few else None, fmt=".0f", cmap="Blues",
            vmin=0, vmax=1, cbar=False, square=True, linewidths=0.5 if is_few else 0, annot_kws={"fontsize": SMALL}, ax=axis,
            xticklabels=names, yticklabels=names if i % columns == 0 else False,
        )  # fmt: skip
        if names:
            axis.tick_params(axis="both", rotation=0, labelsize=SMALL)
            _name_classes(axis, axis.get_xticks(), classes)
        axis.set_title(f"{title(name)}\n{counts.sum():,} predictions, % of each true class", fontsize=SMALL)
        axis.set(xlabel="predicted", ylabel="true" if i % columns == 0 else "")
    return figure


def recalls(predictions: Mapping[str, Sequence[Predictions]], classes: Sequence[str]) -> Figure:
    """Recall of every class by arm, with 95 % intervals (`tables.recalls`).

    Args:
        predictions: by arm, of every replicate.
    """
    table = tables.recalls(predictions, classes)
    alt = f"Recall of every class, with intervals: {_listed(map(title, predictions))}."
    figure, axis = _subplots(figsize=(min(WIDTH, max(6, 0.14 * len(classes) * len(predictions) + 3)), 3.6), alt=alt)
    for i, (arm, style) in enumerate(styles(list(predictions)).items()):
        own = 100 * table[table.arm == arm].set_index("class")[["recall", "low", "high"]]
        places = np.arange(len(own)) + 0.8 * ((i + 0.5) / len(predictions) - 0.5)
        ends = [own.recall - own.low, own.high - own.recall]
        axis.errorbar(places, own.recall, ends, ls="", ms=5, lw=1, capsize=2, label=title(arm), **style)
    axis.set(xlabel="class", ylabel="recall (%)", ylim=(-2, 102), xlim=(-0.5, len(classes) - 0.5))
    axis.grid(axis="x", visible=False)
    if len(classes) <= 30:
        _name_classes(axis, range(len(classes)), classes)
    figure.legend(loc="outside lower center", ncol=6)
    return figure


def reliability(predictions: Mapping[str, Sequence[Predictions]]) -> Figure:
    """Accuracy by confidence, one panel per arm, with 95 % intervals (`tables.calibration`); grey: the share of the images.

    On the diagonal a network is as often right as it says. Below it, it is overconfident.

    Args:
        predictions: by arm, of every replicate, with confidences.
    """
    columns = min(3, len(predictions))
    rows = -(-len(predictions) // columns)
    alt = f"Accuracy by confidence, with intervals: {_listed(map(title, predictions))}."
    size = (3.2 * columns, 3.2 * rows)
    figure, axes = _subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, alt=alt)
    for axis in axes.flat[len(predictions) :]:
        axis.axis("off")
    styled = styles(list(predictions))
    for axis, (arm, of) in zip(axes.flat, predictions.items(), strict=False):
        table = 100 * tables.calibration(of)
        axis.plot([0, 100], [0, 100], "--", color="0.5", lw=1, zorder=1)
        axis.bar(table.confidence, table.share, width=4, color="0.85", zorder=0)
        ends = [table.accuracy - table.low, table.high - table.accuracy]
        axis.errorbar(table.confidence, table.accuracy, ends, ls="", ms=5, lw=1, capsize=2, **styled[arm], zorder=2)
        ece = interval([weighted("ece", one)[0] for one in of])
        axis.set_title(f"{title(arm)}: ECE {ece}", fontsize=SMALL + 1)
        axis.set(xlim=(0, 100), ylim=(0, 102))
        axis.tick_params(labelbottom=True)
    figure.supxlabel("confidence (%)", fontsize=SMALL + 1)
    figure.supylabel("accuracy (%)", fontsize=SMALL + 1)
    return figure


def _listed(names: Iterable[str]) -> str:
    """Names in a sentence; of many the first, and how many there are."""
    names = [str(name).replace("_", " ") for name in names]
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:12])} and {len(names) - 12} more"


def _subplots(*arguments, alt: str, **options) -> tuple[Figure, plt.Axes | np.ndarray]:
    """`plt.subplots` whose figure pyplot forgets: a notebook shows it once, where it is the value of a cell.

    Args:
        alt: what the figure shows, in a sentence, for those who do not see it.
    """
    width, height = options.pop("figsize")
    scale = min(1, WIDTH / width)
    figure, axes = plt.subplots(*arguments, figsize=(scale * width, scale * height), label=alt, **options)
    plt.close(figure)
    return figure, axes


def _arrows(axis: plt.Axes, marked: Sequence[tuple], vertical: bool = False) -> None:
    """An arrow where an interval leaves the frame: (interval, place across it) of each."""
    low, high = axis.get_ylim() if vertical else axis.get_xlim()
    for of, place in marked:
        for end, edge, sign in ((of.mean - of.half_width, low, -1), (of.mean + of.half_width, high, 1)):
            if (edge - end) * sign < 0:
                near = edge - 0.04 * sign * (high - low)
                tip, tail = ((place, edge), (place, near)) if vertical else ((edge, place), (near, place))
                axis.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.5})


def _log_scale(axis: plt.Axes) -> None:
    """A logarithmic y axis with numbers to read also within one power of ten."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def _name_classes(axis: plt.Axes, ticks: Sequence[float], classes: Sequence[str]) -> None:
    """Class names under the axis, slanted where they are too long to stand side by side."""
    if max(len(word) for name in classes for word in str(name).split("_")) > 6:
        axis.set_xticks(ticks, classes, rotation=35, ha="right", rotation_mode="anchor")
    else:
        axis.set_xticks(ticks, [str(name).replace("_", "\n") for name in classes], rotation=0)


def _cycle() -> list:
    return PALETTE * 10


def methods() -> Figure:
    """HDKD, CSKD and DearKD: which part of the CNN teaches which part of the student, and when in training it does."""
    features, logits = STYLES["hdkd"][0], STYLES["student"][0]
    panels = {
        "HDKD": (
            ("stage 1", "stage 2", "stage 3", "logits"),
            ("stage 1", "stage 2", "stage 3", "blocks,\nheads"),
            {0: features, 1: features, 2: features, 3: logits},
            (((0, 0), (0, 1), (1, 1), (1, 0)), ((0, 0), (0, 1), (1, 1), (1, 0))),
            "Equal shapes: features of every stage, and\nlogits to a distillation token, to the end.",
        ),
        "CSKD": (
            ("stages 1, 2", "stage 3", "scores by\nplace", "logits"),
            ("patches", "blocks", "patch\ntokens", "heads"),
            {2: features, 3: logits},
            (((0, 0), (0, 1), (1, 0)), ((0, 0), (0, 1), (1, 1), (1, 0))),
            "Each patch learns the teacher's answer at its\nplace; this fades into its answer to the image.",
        ),
        "DearKD": (
            ("early map", "next map", "stage 3", "logits"),
            ("block 1", "block 3", "more\nblocks", "heads"),
            {0: features, 1: features, 3: logits},
            (((0, 0), (0, 1), (5 / 6, 1), (5 / 6, 0)), ((0, 0), (0, 1), (5 / 6, 1), (5 / 6, 0))),
            "Early maps and logits at first; then the\nstudent trains on the labels without a teacher.",
        ),
    }
    figure, axes = _subplots(
        1,
        3,
        figsize=(WIDTH, 4.2),
        alt="What teaches what, and when: HDKD's shared stages, CSKD's places, DearKD's early layers",
    )
    for axis, (name, (teacher, student, links, times, words)) in zip(axes, panels.items(), strict=True):
        what = "by place" if name == "CSKD" else "features"
        axis.set(xlim=(-0.5, 3.5), ylim=(-2, 1.5), title=name)
        axis.axis("off")
        for y, parts, who, at in ((1, teacher, "CNN teacher", 1.3), (0, student, "student", -0.43)):
            axis.text(-0.48, at, who, fontsize=SMALL, weight="bold")
            for x, part in enumerate(parts):
                axis.add_patch(plt.Rectangle((x - 0.46, y - 0.22), 0.92, 0.44, color="0.9", lw=0))
                axis.text(x, y, part, ha="center", va="center", fontsize=SMALL, linespacing=0.95)
        for x, color in links.items():
            axis.annotate("", (x, 0.24), (x, 0.76), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})
        for y, color, corners, label in ((-0.85, features, times[0], what), (-1.2, logits, times[1], "logits")):
            axis.add_patch(plt.Polygon([(0.4 + 3 * t, y + 0.25 * h) for t, h in corners], color=color, lw=0))
            axis.plot((0.4, 3.4), (y, y), color="0.6", lw=1)
            axis.text(0.3, y + 0.12, label, ha="right", va="center", fontsize=SMALL, color=color)
        axis.text(1.9, -1.25, "training, from first to last epoch", ha="center", va="top", fontsize=SMALL, color="0.3")
        axis.text(-0.48, -1.55, words, va="top", fontsize=SMALL)
    return figure
