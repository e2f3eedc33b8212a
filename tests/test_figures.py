import inspect

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from hdkd_lib import figures, statistics
from hdkd_lib.metrics import Predictions


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        figures.set_style()
        yield
    plt.close("all")


@pytest.fixture
def history():
    return pd.DataFrame(
        {
            "epoch": range(3),
            "train_loss": [4.0, 2.0, 1.0],
            "train_logit_loss": [2.0, 1.0, 0.5],
            "train_feature_loss": [0.2, 0.1, 0.05],
            "val_nll": [1.0, 0.5, 0.4],
            "val_balanced_accuracy": [0.5, 0.7, 0.8],
        }
    )


IMAGES = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 0, 0, 2])
CLASSES = ["no_tumor", "glioma", "pituitary"]


def test_a_contact_sheet_has_a_column_of_images_per_class():
    figure = figures.contact_sheet(IMAGES, LABELS, CLASSES, per_class=2)
    assert len(figure.axes) == 6
    shown = [[len(axis.images) for axis in figure.axes[row * 3 : row * 3 + 3]] for row in range(2)]
    assert shown == [[1, 1, 1], [1, 1, 0]]  # one pituitary only
    assert np.array_equal(figure.axes[3].images[0].get_array(), IMAGES[2].permute(1, 2, 0))
    assert [axis.get_title() for axis in figure.axes[:3]] == ["no\ntumor", "glioma", "pituitary"]


def test_an_image_grid_has_a_row_per_entry():
    figure = figures.image_grid({"as they are": IMAGES[:4], "augmented": IMAGES[:3] / 255})
    assert len(figure.axes) == 8
    assert [len(axis.images) for axis in figure.axes] == [1] * 7 + [0]
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == ["as they are", "augmented"]


def test_class_counts_are_the_heights_of_the_bars():
    (axis,) = figures.class_counts({"train": LABELS, "val": LABELS[:2]}, CLASSES).axes
    assert [[bar.get_height() for bar in bars] for bars in axis.containers] == [[4, 2, 1], [1, 1, 0]]


def test_curves_show_relative_loss_cross_entropy_and_accuracy_of_every_run(history):
    figure = figures.curves({"student": history, "hdkd": history})
    assert len(figure.axes) == 3
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 2]
    assert [axis.lines[0].get_ydata().tolist() for axis in figure.axes] == [[1, 0.5, 0.25], [1, 0.5, 0.4], [50, 70, 80]]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]


def test_loss_terms_stand_under_their_equations_on_logarithmic_axes(history):
    axes = figures.loss_terms(history, {"logit_loss": "$L_1$", "feature_loss": "$L_2$"}).axes
    assert [(axis.get_title(), axis.get_ylabel()) for axis in axes] == [("$L_1$", "logit loss"), ("$L_2$", "feature loss")]
    assert {axis.get_yscale() for axis in axes} == {"log"}
    assert [axis.lines[0].get_ydata().tolist() for axis in axes] == [[2, 1, 0.5], [0.2, 0.1, 0.05]]
    assert axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]


def test_layer_gaps_follow_the_layers_on_logarithmic_axes():
    gaps = [{"layer": "norm1", "mean": 0.5, "var": 0.2}, {"layer": "norm2", "mean": 0.25, "var": 0.4}]
    axes = figures.layer_gaps({"made": gaps, "real": gaps[:1]}).axes
    assert {axis.get_yscale() for axis in axes} == {"log"}
    assert [[line.get_ydata().tolist() for line in axis.lines] for axis in axes] == [[[0.5, 0.25], [0.5]], [[0.2, 0.4], [0.2]]]
    assert axes[0].lines[0].get_xdata().tolist() == [1, 2]


def part(name, *shape, gflops=0.5):
    return {"name": name, "shape": shape, "parameters": 1200, "gflops": gflops}


def test_an_architecture_has_a_labelled_box_per_part_and_an_arrow_per_link():
    above = [part("stages.0", 16, 8, 8), part("stages.1", 24, 2, 2), part("head", 10, gflops=1e-5)]
    below = [part("stages.0", 16, 8, 8), part("patch_embed", 4, 64), part("head", 10), part("head_dist", 10)]
    (axis,) = figures.architecture({"teacher": above, "student": below}, {("stages.1", "stages.0"): "MSE"}).axes
    assert len(axis.patches) == 7
    heights = [box.get_height() for box in axis.patches]
    assert heights[:2] == pytest.approx([1.2, 0.6])  # the square root of the maps' sizes
    assert heights[3] == heights[0]
    texts = [text.get_text() for text in axis.texts]
    assert {"teacher", "student", "MSE", "stages.1", "patch\nembed", "head\ndist"} <= set(texts)
    for label in ("16×8×8\n1,200 par.\n0.5 GFLOPs", "4 × 64\n1,200 par.\n0.5 GFLOPs", "10\n1,200 par.\n< 0.001 GFLOPs"):
        assert label in texts
    arrows = [text for text in axis.texts if isinstance(text, Annotation)]
    assert len(arrows) == 2 + 2 + 1  # within each network, not between the two heads, and the link
    upper, lower = axis.patches[1], axis.patches[3]
    assert arrows[-1].xyann == pytest.approx((upper.get_x() + 0.3, upper.get_y()))
    assert arrows[-1].xy == pytest.approx((lower.get_x() + 0.3, lower.get_y() + lower.get_height()))


def test_overlays_lay_every_map_over_its_image_under_true_and_predicted_class():
    images, coarse = torch.rand(2, 3, 8, 12), torch.rand(2, 2, 3)
    maps = {"attention": coarse, "Grad-CAM": torch.rand(2, 8, 12)}
    predicted = {"attention": torch.tensor([0, 0]), "Grad-CAM": torch.tensor([0, 1])}
    figure = figures.overlays(images, maps, torch.tensor([0, 1]), CLASSES, predicted)
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 2, 2, 2, 2]
    assert [figure.axes[i].get_ylabel() for i in (0, 2, 4)] == ["image", "attention", "Grad-CAM"]
    assert {tuple(image.get_extent()) for axis in figure.axes for image in axis.images} == {(0, 12, 8, 0)}
    for axis, image in zip(figure.axes, [*images] * 3, strict=True):
        assert np.array_equal(axis.images[0].get_array(), image.permute(1, 2, 0))
    assert all(np.array_equal(figure.axes[2 + i].images[1].get_array(), coarse[i]) for i in range(2))
    assert figure.axes[2].images[1].get_alpha() < 1
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["class no\ntumor", "class glioma", "predicted no\ntumor"]
    assert titles[5] == "predicted glioma"
    assert [axis.title.get_color() == figures.WRONG for axis in figure.axes] == [False, False, False, True, False, False]


def told(labels, predicted, confidence) -> Predictions:
    labels = np.array(labels)
    return Predictions(np.arange(len(labels)).astype(str), labels, np.array(predicted), np.array(confidence))


def test_recalls_have_a_mark_and_an_interval_per_arm_and_class():
    runs = [told([0, 0, 1, 1], [0, 0, 1, 0], [0.9] * 4), told([0, 0, 1, 1], [0, 1, 1, 0], [0.9] * 4)]
    figure = figures.recalls({"hdkd": runs, "student": runs[:1]}, ["no_tumor", "glioma"])
    hdkd, student = figure.axes[0].containers
    assert hdkd.lines[0].get_ydata().tolist() == [75, 50]
    assert student.lines[0].get_ydata().tolist() == [100, 50]
    lows = [segment[0, 1] for segment in student.lines[2][0].get_segments()]
    assert lows == pytest.approx([34.24, 9.45], abs=0.01)  # Wilson's of 2 of 2 and of 1 of 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["HDKD", "student"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["no\ntumor", "glioma"]


def test_reliability_shows_accuracy_by_confidence_and_the_share_of_the_images():
    of = told([0, 0, 0, 0], [0, 1, 0, 0], [0.52, 0.52, 0.98, 0.98])
    figure = figures.reliability({"hdkd": [of], "student": [of]})
    axis = figure.axes[0]
    points, bars = axis.containers[1], axis.containers[0]
    assert points.lines[0].get_xdata().tolist() == pytest.approx([52, 98])
    assert points.lines[0].get_ydata().tolist() == pytest.approx([50, 100])
    assert [bar.get_height() for bar in bars] == [50, 50]
    assert [axis.get_title() for axis in figure.axes] == ["HDKD: ECE 2.0", "student: ECE 2.0"]


def test_a_figure_has_words_for_those_who_do_not_see_it(history):
    figure = figures.curves({"hdkd_logits": history})
    assert figure.get_label().endswith("by epoch: hdkd logits.")
    png, metadata = figures._described_png(figure)
    assert png.startswith(b"\x89PNG")
    assert metadata == {"alt": figure.get_label()}
    many = figures.contact_sheet(IMAGES, LABELS, [f"c{i}" for i in range(14)])
    assert many.get_label() == (
        "Images of each class, one column per class: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 and 2 more."
    )


def asked(a: str, b: str, differences: list[float], contrasts: int = 1) -> dict:
    """A row of `tables.contrasts` with a result."""
    variance = statistics.crossed(differences, 0.0, 0.0, 100)
    result = statistics.contrast(differences, variance, 0.02, contrasts)
    return {"claim": "Does it help?", "a": a, "b": b, "verdict": result.verdict, "result": result}


def test_contrasts_show_every_replicate_the_interval_and_the_verdict():
    rows = [asked("hdkd", "student", [0.03, 0.05, 0.04]), asked("cskd", "deit", [-0.01, 0.02, 0.01])]
    rows.append({"claim": "?", "a": "dearkd", "b": "mhca_deit", "verdict": "3 of 8 replicates", "result": None})
    figure = figures.contrasts(pd.DataFrame(rows), smallest=0.02, metric="accuracy at the last epoch")
    (axis,) = figure.axes
    points = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 3]
    assert [list(x) for x in points] == [pytest.approx([3, 5, 4]), pytest.approx([-1, 2, 1])]
    assert all(line.get_fillstyle() == "none" for line in axis.lines if len(line.get_xdata()) == 3)
    ends = [bar.lines[2][0].get_segments()[0][:, 0] for bar in axis.containers]
    for row, (low, high) in zip(rows, ends, strict=False):
        of = row["result"]
        assert (low, high) == (pytest.approx(100 * (of.mean - of.half_width)), pytest.approx(100 * (of.mean + of.half_width)))
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "HDKD \N{MINUS SIGN} student", "CSKD \N{MINUS SIGN} DeiT", "DearKD \N{MINUS SIGN} MHCA-ViT DeiT",
    ]  # fmt: skip
    texts = [text.get_text() for text in axis.texts]
    assert texts[0] == f"{rows[0]['result'].text}, helps, n = 3"
    assert texts[2] == "3 of 8 replicates"
    assert axis.patches[0].get_x() == -2, "the band of what does not matter"
    assert axis.get_xlabel().startswith("difference of accuracy at the last epoch (percentage points)")


def test_an_interval_that_leaves_the_frame_ends_in_an_arrow():
    rows = [asked("cskd", "deit", [0.01 * i, 0.011 * i, 0.012 * i]) for i in (1, 1.1, 1.2, 1.3)]
    inside = figures.contrasts(pd.DataFrame(rows))
    outside = figures.contrasts(pd.DataFrame([*rows, asked("hdkd", "student", [-0.05, 0.1, 0.03], 3)]))

    def arrows(figure):
        return [text for text in figure.axes[0].texts if isinstance(text, Annotation) and text.arrow_patch is not None]

    assert arrows(inside) == []
    assert len(arrows(outside)) == 2
    assert {arrow.xy[0] for arrow in arrows(outside)} == set(outside.axes[0].get_xlim())
    replicates = [x for line in outside.axes[0].lines if line.get_fillstyle() == "none" for x in line.get_xdata()]
    assert max(map(abs, replicates)) < outside.axes[0].get_xlim()[1]


def test_changes_of_a_plan_are_drawn_as_contrasts_too():
    row = asked("hdkd", "student", [0.01, 0.02, 0.03])
    table = pd.DataFrame([{"arm": "hdkd_logits", "like": "hdkd", "change": "stages 3 → none", **row}]).drop(columns="claim")
    (axis,) = figures.contrasts(table).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["HDKD logits: stages 3 → none"]


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_every_method_has_a_colour_that_shows_on_white_and_a_marker_of_its_own():
    styles = [*figures.STYLES.values(), *figures.SPARE]
    assert all(1.05 / (luminance(color) + 0.05) >= 3 for color, _ in styles)
    assert len({color for color, _ in styles}) == len({marker for _, marker in styles}) == len(styles)


def test_a_method_looks_the_same_in_all_figures_and_its_arms_differ_in_filling():
    found = figures.styles(["student", "hdkd", "hdkd_logits", "alpha_25", "student_long"])
    assert found["hdkd"]["color"] == found["hdkd_logits"]["color"] == figures.STYLES["hdkd"][0]
    assert (found["hdkd"]["fillstyle"], found["hdkd_logits"]["fillstyle"]) == ("full", "none")
    assert figures.styles(["HDKD"])["HDKD"]["marker"] == figures.styles(["hdkd"])["hdkd"]["marker"]
    assert found["alpha_25"]["color"] not in {color for color, _ in figures.STYLES.values()}


def test_training_time_shows_the_teachers_apart(frame):
    plan = {"runs": {"teacher": {}, "student": {}, "hdkd": {"like": "student", "teacher": "teacher"}}}
    timed = frame.assign(seconds=frame.arm.map({"teacher": 20.0, "student": 10.0, "hdkd": 15.0}))
    figure = figures.training_time(timed, plan)
    (axis,) = figure.axes
    lines = {round(float(line.get_ydata()[0])): list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2}
    assert lines[82] == pytest.approx([1.5, 3.5])  # HDKD's own 1.5, and then its teacher's 2
    assert lines[80] == pytest.approx([1, 1])
    assert "measured beside other runs" in axis.get_xlabel()


def test_agreement_has_a_bar_per_stage_and_student():
    (axis,) = figures.agreement({"alone": [0.1, 0.2], "hdkd": [0.8, 0.9]}, ["stage 1", "stage 2"]).axes
    assert [[bar.get_height() for bar in bars] for bars in axis.containers] == [[0.1, 0.2], [0.8, 0.9]]
    assert not any(bar.get_hatch() for bars in axis.containers for bar in bars)
    (axis,) = figures.agreement({"dearkd": [0.1], "dearkd_single": [0.1]}, ["stage 1"]).axes
    hatched = [patch.get_hatch() for patch in (*(bars[0] for bars in axis.containers), *axis.get_legend().get_patches())]
    assert hatched == ["", "////", "", "////"], "of one colour"
    with pytest.raises(ValueError, match="zip"):
        figures.agreement({"alone": [0.1]}, ["stage 1", "stage 2"])


def test_a_comparison_shows_every_replicate_every_mean_and_the_baselines(frame):
    neighbours = pd.DataFrame({"classifier": "chance", "replicate": ["seed 0", "seed 1", "another"]})
    neighbours["balanced_accuracy"] = [0.6, 0.7, 0.1]
    figure = figures.comparison(frame.sample(frac=1, random_state=0), ["balanced_accuracy", "ece"], neighbours)
    assert len(figure.axes) == 2
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert sorted(names) == ["HDKD", "student", "teacher"]
    points = [line for line in axis.lines if line.get_fillstyle() == "none" and line.get_linestyle() == "None"]
    shown = {names[round(float(line.get_ydata()[0]))]: sorted(np.round(line.get_xdata())) for line in points}
    assert shown == {"student": [70, 80, 90], "HDKD": [72, 83, 91], "teacher": [95]}
    means = {names[round(c.lines[0].get_ydata()[0] - 0.25)]: c.lines[0].get_xdata()[0] for c in axis.containers}
    assert means == pytest.approx({"teacher": 95, "student": 80, "HDKD": 82})
    assert "chance: 65.0 %" in axis.get_legend_handles_labels()[1]


def test_mean_curves_draw_replicates_and_their_mean(history):
    better = history.assign(val_balanced_accuracy=[0.7, 0.9, 1.0])
    (axis,) = figures.mean_curves({"hdkd": [history, better]}).axes
    assert len(axis.lines) == 3
    assert axis.lines[-1].get_ydata().tolist() == pytest.approx([60, 80, 90])
    assert axis.get_ylabel() == "validation balanced accuracy (%)"


def test_confusions_show_percent_of_the_true_class_and_what_they_sum():
    figure = figures.confusions({"student": [[3, 1], [0, 0]], "hdkd": [[4, 0], [1, 1]]}, ["a", "b"])
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "0", "0"]
    assert figure.axes[0].collections[0].get_array().ravel().tolist() == [0.75, 0.25, 0, 0]
    assert figure.axes[1].get_title() == "HDKD\n6 predictions, % of each true class"
    many = figures.confusions(dict.fromkeys("abcd", np.eye(10)), list("0123456789"))
    assert len({axis.get_subplotspec().colspan.start for axis in many.axes}) == 3, "at most three a row"


def test_duplicate_pairs_show_conflicts_first_then_crossings_and_name_both_sides():
    rows = [("a", "b", "exact", 0, False, False), ("c", "d", "near", 0.3, False, True), ("a", "d", "near", 0.2, True, True)]
    pairs = pd.DataFrame(rows, columns=["a", "b", "match", "ratio", "is_conflict", "is_crossing"])
    pairs = pairs.assign(label_a="cat", label_b="dog", part_a="train", part_b="test")
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 5, 5) * 50
    figure = figures.duplicate_pairs(pairs, list("abcd"), images)
    shown = np.array([axis.images[0].get_array()[0, 0, 0] // 50 for axis in figure.axes]).reshape(2, 3)
    assert shown.T.tolist() == [[0, 3], [2, 3], [0, 1]]
    assert [axis.get_title() for axis in figure.axes[::3]] == ["train\ncat", "test\ndog"]
    ratios = ["near, ratio 0.20", "near, ratio 0.30", "exact, ratio 0.00"]
    assert [axis.texts[0].get_text() for axis in figure.axes[3:]] == ratios
    assert len(figures.duplicate_pairs(pairs, list("abcd"), images, count=1).axes) == 2
    empty = figures.duplicate_pairs(pairs[:0], list("abcd"), images)
    assert empty.axes[0].texts[0].get_text() == "no duplicates found"


def test_leakage_gain_has_a_panel_per_classifier_and_a_mean_per_protocol():
    rows = [(p, c, 0.1 * n + f / 100) for n, p in enumerate(["random", "grouped"]) for c in ("knn", "lr") for f in range(5)]
    scores = pd.DataFrame(rows, columns=["protocol", "classifier", "balanced_accuracy"])
    figure = figures.leakage_gain(scores)
    assert [axis.get_title() for axis in figure.axes] == ["knn", "lr"]
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["random", "grouped"]
        assert [bar.lines[0].get_ydata()[0] for bar in axis.containers] == pytest.approx([0.02, 0.12])


def test_schedules_are_drawn_over_training_and_the_chosen_one_is_thick():
    figure = figures.schedules({"linear": lambda t: 1 - t, "local": lambda t: 1.0}, "local")
    linear, local = figure.axes[0].lines
    assert (linear.get_ydata()[0], linear.get_ydata()[-1], local.get_ydata()[-1]) == (1, 0, 1)
    assert local.get_linewidth() > linear.get_linewidth()


def test_attention_distances_have_a_dot_per_head_and_a_line_of_means():
    figure = figures.attention_distances({"DeiT": torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "CSKD": torch.zeros(2, 2)})
    axis = figure.axes[0]
    assert [line.get_ydata().tolist() for line in axis.lines] == [[2, 5], [0, 0]]
    assert axis.collections[0].get_offsets()[:, 1].tolist() == [1, 3, 5, 5]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["DeiT", "CSKD"]


def test_heatmaps_have_a_row_per_entry_and_a_scale_per_map():
    maps = torch.rand(3, 4, 5)
    figure = figures.heatmaps({"block 0": maps, "block 1": maps[:2]}, "head")
    shown = [image for axis in figure.axes for image in axis.images]
    assert [image.get_array().shape for image in shown] == [(4, 5)] * 5
    assert [image.get_clim()[0] for image in shown] == pytest.approx([float(m.min()) for m in (*maps, *maps[:2])])
    assert [axis.get_title() for axis in figure.axes] == ["head 0", "head 1", "head 2", "", "", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["block 0", "block 1"]


def test_efficiency_draws_every_replicate_a_mean_and_an_interval_per_arm_and_share():
    rows = [(arm, share, 0.5 + share / 4 + seed / 100) for arm in ("vit", "cskd") for share in (0.1, 1.0) for seed in range(3)]
    frame = pd.DataFrame(rows, columns=["arm", "fraction", "last_balanced_accuracy"])
    frame = frame.assign(replicate="fraction " + frame.fraction.astype(str), dataset="digits", protocol="grouped")
    neighbours = pd.DataFrame({"classifier": "nearest", "replicate": ["fraction 0.1", "fraction 1.0"]})
    figure = figures.efficiency(frame, baselines=neighbours.assign(balanced_accuracy=[0.3, 0.8]))
    [axis] = figure.axes
    lines = [container.lines[0] for container in axis.containers]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nearest", "ViT", "CSKD"]
    [dashed] = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert (list(dashed.get_xdata()), list(dashed.get_ydata())) == ([10, 100], [30, 80])
    for line in lines:
        np.testing.assert_allclose(np.array(line.get_ydata(), float), [53.5, 76.0])
        np.testing.assert_allclose(np.array(line.get_xdata(), float), [10, 100], rtol=0.03)
    assert len([line for line in axis.lines if len(line.get_xdata()) == 6]) == 2, "every replicate"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["10", "100"]


def test_the_same_figure_gives_the_same_file(history, tmp_path):
    paths = [figures.save(figures.curves({"hdkd": history}), tmp_path / "new" / f"{i}.png") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].with_suffix(".pdf").read_bytes() == paths[1].with_suffix(".pdf").read_bytes()
    with Image.open(paths[0]) as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_no_figure_is_wider_than_a_page_and_no_text_is_small_on_it(history, frame):
    """Of every kind that this module draws: ten pixels at least on a page of 830."""
    drawn = [
        figures.contact_sheet(IMAGES, LABELS, CLASSES * 4),
        figures.class_counts({"train": LABELS}, CLASSES),
        figures.curves({"student": history}),
        figures.loss_terms(history, {"logit_loss": "$L_1$", "feature_loss": "$L_2$", "loss": "$L$"}),
        figures.comparison(frame),
        figures.mean_curves({"hdkd": [history]}),
        figures.confusions({"hdkd": np.eye(10)}, CLASSES * 3 + ["x"]),
        figures.contrasts(pd.DataFrame([asked("hdkd", "student", [0.01, 0.02])])),
        figures.architecture({"teacher": [part("stages.0", 16, 8, 8)] * 9, "student": [part("head", 10)]}, {}),
        figures.overlays(IMAGES, {"attention": torch.rand(7, 2, 2)}, LABELS, CLASSES, {"attention": LABELS}),
        figures.recalls({"hdkd": [told([0, 1], [0, 1], [0.6, 0.9])]}, CLASSES[:2]),
        figures.reliability({arm: [told([0, 1], [0, 1], [0.6, 0.9])] for arm in ("vit", "deit", "cskd", "hdkd")}),
        figures.heatmaps({"block 0": torch.rand(12, 4, 4)}),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        width = figure.get_size_inches()[0]
        assert width <= figures.WIDTH
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        smallest = min(texts, key=lambda text: text.get_fontsize())
        assert smallest.get_fontsize() / 72 * 830 / width >= 10, smallest.get_text()


def test_every_public_figure_is_tested_here():
    drawn = {name for name, f in vars(figures).items() if inspect.isfunction(f) and f.__annotations__.get("return") is Figure}
    source = inspect.getsource(inspect.getmodule(test_every_public_figure_is_tested_here))
    assert drawn
    assert [name for name in drawn if not name.startswith("_") and f"figures.{name}(" not in source] == []


def test_the_methods_are_told_apart_by_what_teaches_and_when():
    axes = figures.methods().axes
    assert [axis.get_title() for axis in axes] == ["HDKD", "CSKD", "DearKD"]
    arrows = [[text for text in axis.texts if isinstance(text, Annotation)] for axis in axes]
    assert [len(own) for own in arrows] == [4, 2, 3]
    ends = [max(patch.get_xy()[:, 0].max() for patch in axis.patches if isinstance(patch, plt.Polygon)) for axis in axes]
    assert ends[0] == ends[1] == pytest.approx(3.4)
    assert ends[2] == pytest.approx(0.4 + 3 * 5 / 6)  # DearKD's student trains on without a teacher
