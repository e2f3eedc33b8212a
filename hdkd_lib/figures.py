"""Figures, all in one style. Each function draws on axes of its own and returns the figure, which pyplot does not keep."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

from hdkd_lib.statistics import interval
from hdkd_lib.tables import METRICS

PALETTE = sns.color_palette("colorblind")


def set_style() -> None:
    """The study's style; call once at the top of a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "hdkd",  # the same figure gives the same file
        }
    )
    if (shell := get_ipython()) is not None:
        plt.close(plt.figure())  # Jupyter's backend registers its own way of showing figures with the first of them
        shell.display_formatter.formatters["image/png"].for_type(Figure, _light_png)


def _light_png(figure: Figure) -> bytes:
    """A third of the usual bytes, by 256 colours: notebooks are committed with their figures."""
    whole, light = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=figure.dpi, bbox_inches="tight")
    Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(light, format="png", optimize=True)
    return light.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG at 200 dpi and makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path


def contact_sheet(images: Tensor, labels: Tensor, classes: Sequence[str], per_class: int = 6) -> Figure:
    """The first `per_class` images (N, 3, S, S; uint8, or float in [0, 1]) of every class, one column per class."""
    columns = len(classes)
    figure, axes = _subplots(per_class, columns, figsize=(1.15 * columns, 1.15 * per_class + 0.3), squeeze=False)
    for c, name in enumerate(classes):
        chosen = images[labels == c][:per_class]
        for row, axis in enumerate(axes[:, c]):
            axis.axis("off")
            if row < len(chosen):
                axis.imshow(chosen[row].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes[0, c].set_title(str(name).replace("_", "\n"), fontsize=9)
    return figure


def image_grid(rows: Mapping[str, Tensor]) -> Figure:
    """One row of images per entry, (N, 3, S, S) uint8 or float in [0, 1]."""
    count = max(len(images) for images in rows.values())
    figure, axes = _subplots(len(rows), count, figsize=(1.15 * count + 0.8, 1.2 * len(rows)), squeeze=False)
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
    worst = pairs.sort_values(["is_conflict", "is_crossing", "bits"], ascending=False, kind="stable").head(count)
    figure, axes = _subplots(2, max(1, len(worst)), figsize=(1.5 * max(4, len(worst)), 4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    if not len(worst):
        axes[0, 0].text(0, 0.5, "no duplicates found")
    for column, pair in zip(axes.T, worst.itertuples(), strict=False):
        for axis, side in zip(column, "ab", strict=True):
            axis.imshow(images[number[getattr(pair, side)]].permute(1, 2, 0).numpy(), interpolation="nearest")
            title = f"{getattr(pair, f'part_{side}')}\n{getattr(pair, f'label_{side}')}".strip().replace("_", " ")
            axis.set_title(title, fontsize=8, color="C3" if pair.is_conflict else "black")
        place = {"transform": column[1].transAxes, "ha": "center", "va": "top"}
        column[1].text(0.5, -0.04, f"{pair.kind}, {pair.bits} bits", fontsize=8, **place)
    return figure


def optimism(scores: pd.DataFrame) -> Figure:
    """Scores of `leakage.optimism` by protocol: every fold, and the mean with its 95 % interval."""
    names = list(scores.classifier.unique())
    figure, axes = _subplots(1, len(names), figsize=(3.2 * len(names), 3), sharey=True, squeeze=False)
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
        networks: name and `models.parts` of the upper and of the lower network.
        links: (part above, part below) and what is written on the arrow between them.
    """
    columns = max(len(parts) for parts in networks.values())
    figure, axis = _subplots(figsize=(1.3 * columns + 1, 4.6))
    axis.set(xlim=(-1, columns - 0.6), ylim=(-3.6, 1.5))
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
            axis.text(x, y, part["name"].replace("_", "\n"), ha="center", va="center", fontsize=8)
            place = {"va": "top" if below else "bottom", "ha": "center", "fontsize": 7, "color": "0.3"}
            axis.text(x, y - 0.68 if below else y + 0.68, label, **place)
            if x and (kind > 1 or part["shape"] != parts[x - 1]["shape"]):  # two heads stand side by side
                axis.annotate("", (x - 0.32, y), (x - 0.68, y), arrowprops={"arrowstyle": "->", "color": "0.6"})
    for (above, below), text in links.items():
        start, end = boxes[0, above], boxes[1, below]
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": PALETTE[3], "lw": 1.5, "ls": "--"})
        middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        axis.text(*middle, text, color=PALETTE[3], fontsize=8, ha="center", va="center", backgroundcolor="white")
    return figure


def overlays(images: Tensor, maps: Mapping[str, Tensor], limits: tuple[float, float] | None = None) -> Figure:
    """The images (N, 3, H, W; uint8, or float in [0, 1]), and below them every entry's maps (N, h, w) laid over them.

    Args:
        limits: values of the darkest and the brightest colour, with a scale beside; None: each map's own extremes.
    """
    low, high = limits or (None, None)
    count = len(images)
    figure, axes = _subplots(1 + len(maps), count, figsize=(1.2 * count + 1, 1.25 * (1 + len(maps))), squeeze=False)
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    height, width = pictures.shape[1:3]
    for line, (name, values) in zip(axes, {"image": None, **maps}.items(), strict=True):
        for i, axis in enumerate(line):
            axis.imshow(pictures[i], interpolation="nearest", extent=(0, width, height, 0))
            if values is not None:
                over = {"cmap": "inferno", "alpha": 0.6, "interpolation": "nearest", "extent": (0, width, height, 0)}
                axis.imshow(values[i].cpu().numpy(), vmin=low, vmax=high, **over)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    if limits:
        shown = plt.cm.ScalarMappable(plt.Normalize(low, high), "inferno")
        figure.colorbar(shown, ax=axes[1:], shrink=0.8, aspect=12 * len(maps))
    return figure


def class_counts(parts: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """Images per class in each part of a split; `parts` holds label tensors."""
    rows = [(part, classes[c], int((labels == c).sum())) for part, labels in parts.items() for c in range(len(classes))]
    figure, axis = _subplots(figsize=(max(5, 0.9 * len(classes) + 2), 3))
    sns.barplot(pd.DataFrame(rows, columns=["part", "class", "images"]), x="class", y="images", hue="part", ax=axis)
    _name_classes(axis, range(len(classes)), classes)
    axis.set_xlabel("")
    sns.move_legend(axis, "lower center", bbox_to_anchor=(0.5, 1), ncol=len(parts), title=None, frameon=False)
    return figure


def curves(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Training loss (divided by its first value), validation cross-entropy and balanced accuracy by epoch."""
    figure, axes = _subplots(1, 3, figsize=(11, 3))
    for i, (name, history) in enumerate(histories.items()):
        style = {"label": name, "linestyle": ("-", "--", "-.", ":")[i % 4]}  # one may lie on another
        axes[0].plot(history.epoch + 1, history.train_loss / history.train_loss.iloc[0], **style)
        axes[1].plot(history.epoch + 1, history.val_nll, **style)
        axes[2].plot(history.epoch + 1, 100 * history.val_balanced_accuracy, **style)
    for axis, title in zip(
        axes, ("training loss / first epoch's", "validation cross-entropy", "validation balanced accuracy (%)"), strict=True
    ):
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[2].set_ylim(top=100)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def loss_terms(history: pd.DataFrame, terms: Mapping[str, str], yscale: str = "log") -> Figure:
    """Terms of a method's loss by epoch, each under its equation.

    Args:
        terms: column of the history without its prefix `train_`, and the equation in TeX.
    """
    figure, axes = _subplots(1, len(terms), figsize=(4.6 * len(terms), 3), squeeze=False)
    for axis, color, (term, equation) in zip(axes[0], _cycle(), terms.items(), strict=False):
        axis.plot(history.epoch + 1, history[f"train_{term}"], color=color)
        axis.set(title=equation, xlabel="epoch", ylabel=term.replace("_", " "))
        if yscale == "log":
            _log_scale(axis)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def agreement(scores: Mapping[str, Sequence[float]], stages: Sequence[str]) -> Figure:
    """Feature agreement with the teacher (linear CKA) per stage, one group of bars per stage."""
    rows = [(stage, name, value) for name, values in scores.items() for stage, value in zip(stages, values, strict=True)]
    figure, axis = _subplots(figsize=(5.5, 3))
    sns.barplot(pd.DataFrame(rows, columns=["stage", "student", "CKA"]), x="stage", y="CKA", hue="student", ax=axis)
    axis.set(ylim=(0, 1), ylabel="linear CKA with the teacher", xlabel="")
    sns.move_legend(axis, "lower center", bbox_to_anchor=(0.5, 1), ncol=len(scores), title=None, frameon=False)
    return figure


def comparison(frame: pd.DataFrame, metrics: Sequence[str] = ("balanced_accuracy", "accuracy", "macro_auroc")) -> Figure:
    """Test metrics by kind of run: a dot per replicate, one seed and fold joined, mean and 95 % t interval in black."""
    names = list(dict.fromkeys(frame.run))
    width = max(3.6, 0.5 * len(names))
    figure, axes = _subplots(1, len(metrics), figsize=(width * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for color, (_, replicate) in zip(_cycle(), frame.groupby(["seed", "fold"]), strict=False):
            values = replicate.set_index("run")[metric].reindex(names) * 100
            axis.plot(range(len(names)), values, "-", color="0.8", lw=1, zorder=1)
            label = f"seed {replicate.seed.iloc[0]}, fold {replicate.fold.iloc[0]}"
            axis.scatter(range(len(names)), values, s=26, color=color, label=label, zorder=2)
        for x, name in enumerate(names):
            estimate = interval(frame[frame.run == name][metric])
            half = None if np.isnan(estimate.half_width) else 100 * estimate.half_width
            axis.errorbar(x + 0.22, 100 * estimate.mean, half, fmt="_", color="black", ms=10, capsize=3, zorder=3)
        low, high = axis.get_ylim()  # an interval of few runs may reach beyond what the metric can be
        axis.set(title=f"{METRICS[metric]} (%)", xlim=(-0.4, len(names) - 0.4), ylim=(max(low, 0), min(high, 101)))
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 4 else {}
        axis.set_xticks(range(len(names)), names, **slanted)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=5, fontsize=8)
    return figure


def schedules(weights: Mapping[str, Callable[[float], float]], chosen: str) -> Figure:
    """A weight over the progress of training, by name of its schedule; the chosen one is thick."""
    figure, axis = _subplots(figsize=(4.5, 2.6))
    progress = np.linspace(0, 1, 101)
    for name, weight in weights.items():
        axis.plot(progress, [weight(t) for t in progress], lw=3 if name == chosen else 1, label=name)
    axis.set(xlabel="progress of training", ylabel="weight of the local responses")
    axis.legend(fontsize=8)
    return figure


def attention_distances(distances: Mapping[str, Tensor]) -> Figure:
    """Mean attention distance of every head (blocks, heads) by block: a dot per head, a line through the blocks' means."""
    figure, axis = _subplots(figsize=(5.5, 3.2))
    for i, (color, (name, values)) in enumerate(zip(_cycle(), distances.items(), strict=False)):
        blocks = np.arange(1, len(values) + 1) + 0.08 * (i - (len(distances) - 1) / 2)
        axis.plot(blocks, values.mean(1), color=color, label=name)
        axis.scatter(blocks.repeat(values.shape[1]), values.flatten(), s=14, color=color, alpha=0.5)
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
    figure, axes = _subplots(len(rows), count, figsize=(1.15 * count + 1.6, 1.2 * len(rows)), squeeze=False)
    for line, (name, maps) in zip(axes, rows.items(), strict=True):
        for axis, values in zip(line, maps, strict=False):
            axis.imshow(values.cpu().numpy(), cmap="inferno")
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for i, axis in enumerate(axes[0]):
        axis.set_title(f"{each} {i}", fontsize=8)
    return figure


def layer_gaps(gaps: Mapping[str, Sequence[Mapping]]) -> Figure:
    """How far images are from what every batch norm remembers, by `inversion.statistics_gap`: means and variances, by layer."""
    figure, axes = _subplots(1, 2, figsize=(11, 3))
    for axis, statistic, label in zip(
        axes, ("mean", "var"), ("means: RMS difference / running std", "variances: mean |log ratio|"), strict=True
    ):
        for name, rows in gaps.items():
            axis.plot(range(1, len(rows) + 1), [row[statistic] for row in rows], marker=".", label=name)
        axis.set(xlabel="batch norm, from first to last", title=label)
        _log_scale(axis)
    axes[0].legend()
    return figure


def efficiency(frame: pd.DataFrame, metric: str = "balanced_accuracy") -> Figure:
    """A test metric by the share of the training images, per kind of run: means and their 95 % t intervals."""
    figure, axis = _subplots(figsize=(6.5, 3.6))
    kinds = list(dict.fromkeys(frame.kind))
    for i, (color, kind) in enumerate(zip(_cycle(), kinds, strict=False)):
        groups = frame[frame.kind == kind].groupby("fraction")[metric]
        places = np.array(sorted(groups.groups)) * 1.03 ** (i - (len(kinds) - 1) / 2)
        estimates = [interval(values) for _, values in groups]
        half = [0 if np.isnan(e.half_width) else 100 * e.half_width for e in estimates]
        axis.errorbar(
            100 * places, [100 * e.mean for e in estimates], half, color=color, marker="o", ms=4, capsize=3, label=kind
        )
    axis.set(xscale="log", xlabel="training images (%)", ylabel=f"{METRICS[metric]} (%)")
    ticks = sorted(100 * frame.fraction.unique())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(max(axis.get_ylim()[0], 0), min(axis.get_ylim()[1], 101))
    axis.legend(fontsize=8)
    return figure


def forest(table: pd.DataFrame, reference: str) -> Figure:
    """Differences of `tables.ablations` to the reference run with their 95 % intervals, one line per change, in points."""
    figure, axis = _subplots(figsize=(8, 0.28 * len(table) + 0.9))
    groups = list(dict.fromkeys(table.parameters))
    colors = sns.color_palette("husl", len(groups))
    for y, row in enumerate(table.itertuples()):
        width = 0 if np.isnan(row.difference_half_width) else 100 * row.difference_half_width
        color = colors[groups.index(row.parameters)]
        axis.errorbar(100 * row.difference, y, xerr=width, fmt="o", color=color, capsize=3, markersize=5)
    axis.axvline(0, color="0.3", lw=1)
    axis.set_yticks(range(len(table)), table.change, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"difference to {reference} (percentage points, 95 % paired interval)")
    return figure


def mean_curves(histories: Mapping[str, Sequence[pd.DataFrame]], column: str = "val_balanced_accuracy") -> Figure:
    """A history column in percent by epoch: every replicate thin, the mean of each kind of run thick."""
    figure, axis = _subplots(figsize=(7.5, 3.4))
    for color, (name, replicates) in zip(_cycle(), histories.items(), strict=False):
        for history in replicates:
            axis.plot(history.epoch + 1, 100 * history[column], color=color, lw=0.4, alpha=0.3)
        mean = pd.concat(replicates).groupby("epoch")[column].mean()
        axis.plot(mean.index + 1, 100 * mean, color=color, lw=2, label=f"{name} (mean of {len(replicates)})")
    axis.set(xlabel="epoch", ylabel=f"{column.replace('val_', 'validation ').replace('_', ' ')} (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def confusions(matrices: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str]) -> Figure:
    """Confusion matrices side by side: counts in the cells, colour by the share of the true class (rows).

    More than 30 classes are drawn without counts and names.
    """
    is_few = len(classes) <= 30
    names = [str(name).replace("_", "\n") for name in classes] if is_few else False
    size = max(3.2, 0.55 * len(classes) + 1) if is_few else 6
    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = _subplots(rows, columns, figsize=(size * columns + 0.8, size * rows), squeeze=False)
    for axis in axes.flat[len(matrices) :]:
        axis.axis("off")
    for i, (axis, (name, counts)) in enumerate(zip(axes.flat, matrices.items(), strict=False)):
        counts = np.asarray(counts)
        sns.heatmap(
            counts / np.maximum(counts.sum(1, keepdims=True), 1), annot=counts if is_few else None, fmt="d", cmap="Blues",
            vmin=0, vmax=1, cbar=False, square=True, linewidths=0.5 if is_few else 0, annot_kws={"fontsize": 9}, ax=axis,
            xticklabels=names, yticklabels=names if i % columns == 0 else False,
        )  # fmt: skip
        if is_few:
            axis.tick_params(axis="both", rotation=0, labelsize=8)
            _name_classes(axis, axis.get_xticks(), classes)
        axis.set(title=name, xlabel="predicted", ylabel="true" if i % columns == 0 else "")
    return figure


def _subplots(*arguments, **options) -> tuple[Figure, plt.Axes | np.ndarray]:
    """`plt.subplots` whose figure pyplot forgets: a notebook shows it once, where it is the value of a cell."""
    figure, axes = plt.subplots(*arguments, **options)
    plt.close(figure)
    return figure, axes


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
