import inspect

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from hdkd_lib import figures


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


def test_overlays_lay_every_map_over_its_image():
    images, coarse = torch.rand(2, 3, 8, 12), torch.rand(2, 2, 3)
    figure = figures.overlays(images, {"attention": coarse, "Grad-CAM": torch.rand(2, 8, 12)})
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 2, 2, 2, 2]
    assert [figure.axes[i].get_ylabel() for i in (0, 2, 4)] == ["image", "attention", "Grad-CAM"]
    assert {tuple(image.get_extent()) for axis in figure.axes for image in axis.images} == {(0, 12, 8, 0)}
    for axis, image in zip(figure.axes, [*images] * 3, strict=True):
        assert np.array_equal(axis.images[0].get_array(), image.permute(1, 2, 0))
    assert all(np.array_equal(figure.axes[2 + i].images[1].get_array(), coarse[i]) for i in range(2))
    assert figure.axes[2].images[1].get_alpha() < 1


def test_a_forest_has_a_point_and_an_interval_per_change_with_zero_marked():
    table = pd.DataFrame({"parameters": ["alpha", "alpha", "gate"], "change": ["a", "b", "c"]})
    table = table.assign(difference=[0.02, -0.01, 0.05], difference_half_width=[0.013, np.nan, 0.04])
    (axis,) = figures.forest(table, "hdkd").axes
    points = [[values.item() for values in bar.lines[0].get_data()] for bar in axis.containers]
    assert points == [pytest.approx(point) for point in ([2, 0], [-1, 1], [5, 2])]
    ends = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axis.containers]
    assert ends == [pytest.approx(end) for end in ([0.7, 3.3], [-1, -1], [1, 9])]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first change is on top"
    colors = [bar.lines[0].get_color() for bar in axis.containers]
    assert colors[0] == colors[1] != colors[2]
    assert [0, 0] in [list(line.get_xdata()) for line in axis.lines]
    assert axis.get_xlabel().startswith("difference to hdkd (percentage points")


def test_agreement_has_a_bar_per_stage_and_student():
    (axis,) = figures.agreement({"alone": [0.1, 0.2], "hdkd": [0.8, 0.9]}, ["stage 1", "stage 2"]).axes
    assert [[bar.get_height() for bar in bars] for bars in axis.containers] == [[0.1, 0.2], [0.8, 0.9]]
    with pytest.raises(ValueError, match="zip"):
        figures.agreement({"alone": [0.1]}, ["stage 1", "stage 2"])


def test_a_comparison_shows_every_replicate_and_every_mean(frame):
    figure = figures.comparison(frame.sample(frac=1, random_state=0), metrics=["balanced_accuracy", "ece"])
    assert len(figure.axes) == 2
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_xticklabels()]
    replicates = [dots.get_offsets()[:, 1] for dots in axis.collections if len(dots.get_offsets()) == len(names)]
    assert sorted(round(values[names.index("student")]) for values in replicates) == [70, 80, 90]
    assert sorted(round(values[names.index("hdkd")]) for values in replicates) == [72, 83, 91]
    means = {names[round(c.lines[0].get_xdata()[0] - 0.22)]: c.lines[0].get_ydata()[0] for c in axis.containers}
    assert means == pytest.approx({"teacher": 95, "student": 80, "hdkd": 82})


def test_mean_curves_draw_replicates_and_their_mean(history):
    better = history.assign(val_balanced_accuracy=[0.7, 0.9, 1.0])
    (axis,) = figures.mean_curves({"hdkd": [history, better]}).axes
    assert len(axis.lines) == 3
    assert axis.lines[-1].get_ydata().tolist() == pytest.approx([60, 80, 90])
    assert axis.get_ylabel() == "validation balanced accuracy (%)"


def test_confusions_stand_side_by_side_coloured_by_the_share_of_the_true_class():
    figure = figures.confusions({"student": [[3, 1], [0, 0]], "hdkd": [[4, 0], [1, 1]]}, ["a", "b"])
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1", "0", "0"]
    assert figure.axes[0].collections[0].get_array().ravel().tolist() == [0.75, 0.25, 0, 0]


def test_duplicate_pairs_show_conflicts_first_then_crossings_and_name_both_sides():
    rows = [("a", "b", "exact", 0, False, False), ("c", "d", "near", 9, False, True), ("a", "d", "near", 4, True, True)]
    pairs = pd.DataFrame(rows, columns=["a", "b", "kind", "bits", "is_conflict", "is_crossing"])
    pairs = pairs.assign(label_a="cat", label_b="dog", part_a="train", part_b="test")
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 5, 5) * 50
    figure = figures.duplicate_pairs(pairs, list("abcd"), images)
    shown = np.array([axis.images[0].get_array()[0, 0, 0] // 50 for axis in figure.axes]).reshape(2, 3)
    assert shown.T.tolist() == [[0, 3], [2, 3], [0, 1]]
    assert [axis.get_title() for axis in figure.axes[::3]] == ["train\ncat", "test\ndog"]
    assert [axis.texts[0].get_text() for axis in figure.axes[3:]] == ["near, 4 bits", "near, 9 bits", "exact, 0 bits"]
    assert len(figures.duplicate_pairs(pairs, list("abcd"), images, count=1).axes) == 2
    empty = figures.duplicate_pairs(pairs[:0], list("abcd"), images)
    assert empty.axes[0].texts[0].get_text() == "no duplicates found"


def test_optimism_has_a_panel_per_classifier_and_a_mean_per_protocol():
    rows = [(p, c, 0.1 * n + f / 100) for n, p in enumerate(["random", "grouped"]) for c in ("knn", "lr") for f in range(5)]
    scores = pd.DataFrame(rows, columns=["protocol", "classifier", "balanced_accuracy"])
    figure = figures.optimism(scores)
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


def test_efficiency_draws_a_mean_and_an_interval_per_kind_and_share():
    rows = [
        (kind, share, 0.5 + share / 4 + seed / 100) for kind in ("vit", "cskd") for share in (0.1, 1.0) for seed in range(3)
    ]
    frame = pd.DataFrame(rows, columns=["kind", "fraction", "balanced_accuracy"])
    [axis] = figures.efficiency(frame).axes
    lines = [container.lines[0] for container in axis.containers]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["vit", "cskd"]
    for line in lines:
        np.testing.assert_allclose(np.array(line.get_ydata(), float), [53.5, 76.0])
        np.testing.assert_allclose(np.array(line.get_xdata(), float), [10, 100], rtol=0.03)
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["10", "100"]


def test_the_same_figure_gives_the_same_file(history, tmp_path):
    paths = [figures.save(figures.curves({"hdkd": history}), tmp_path / "new" / f"{i}.png") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_every_public_figure_is_tested_here():
    drawn = {name for name, f in vars(figures).items() if inspect.isfunction(f) and f.__annotations__.get("return") is Figure}
    source = inspect.getsource(inspect.getmodule(test_every_public_figure_is_tested_here))
    assert drawn
    assert [name for name in drawn if not name.startswith("_") and f"figures.{name}(" not in source] == []
