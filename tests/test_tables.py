"""Verdicts, accuracies and ablations from simulated plans whose predictions are written as `fit` writes them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from hdkd_lib import figures, packing, runs, tables
from hdkd_lib.methods import Supervised
from hdkd_lib.metrics import Predictions, weighted
from hdkd_lib.training import predict

CLASSES = ["a", "b", "c", "d"]
PLAN = {
    "name": "simulated",
    "questions": {
        "one": {"ask": "Does it help?", "contrasts": {"than nothing": ["cskd", "vit"], "than labels": ["cskd", "deit"]}},
        "two": {"ask": "Does DeiT help?", "contrasts": {"than no teacher": ["deit", "vit"]}},
    },
    "metric": "accuracy",
    "epoch": "last",
    "smallest_difference": 0.02,
    "parameters": {"recipe": {"epochs": 3}},
    "replicates": [{"draw": r, "seed": r} for r in range(8)],
    "runs": {
        "teacher": {"network": "hdkd_teacher"},
        "vit": {"network": "vit_tiny_patch16_224"},
        "deit": {"like": "vit", "method": "DeiT", "teacher": "teacher", "options": {"alpha": 0.5}},
        "cskd": {"like": "deit", "method": "CSKD"},
        "cskd_local": {"like": "cskd", "options": {"schedule": "local"}, "recipe": {"epochs": 9}},
    },
}
TRUTH = np.random.default_rng(0).integers(4, size=400)


@pytest.fixture
def simulated(tmp_path):
    """`simulated(arm, accuracies, ...)`: finished runs of an arm, one per replicate, right about these shares of the images."""

    def simulated(arm: str, accuracies, folder="runs", ids=None, dataset="cifar10", protocol="official", **changed):
        for r, accuracy in enumerate(accuracies):
            random = np.random.default_rng([r, len(arm), sum(map(ord, arm))])
            path = tmp_path / folder / f"{arm}-draw{r}-seed{r}"
            path.mkdir(parents=True)
            own = ids(r) if ids else [f"test/{i:04}" for i in range(400)]
            wrong = np.zeros(400, bool)
            wrong[random.permutation(400)[: round(400 * (1 - accuracy))]] = True
            answer = np.where(wrong, (TRUTH + 1) % 4, TRUTH)
            probabilities = np.full((400, 4), 0.1)
            probabilities[np.arange(400), answer] = 0.7
            table = pd.DataFrame(probabilities, columns=CLASSES)
            table.insert(0, "label", [CLASSES[c] for c in TRUTH])
            table.insert(0, "id", own)
            for file in ("predictions.csv", "predictions_last.csv"):
                table.to_csv(path / file, index=False)
            split = pd.DataFrame({"id": [*own, "train/0"], "part": ["test"] * 400 + ["train"]})
            split.to_csv(path / "split.csv", index=False)
            pd.DataFrame({"epoch": [0], "train_loss": [1.0]}).to_csv(path / "history.csv", index=False)
            scores = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc"), accuracy) | {"ece": 0.1}
            last = {"epoch": 2, "test": scores, "train": {"accuracy": 0.95 if arm == "teacher" else 0.8}}
            measured = {"best": {"epoch": 1, "test": scores}, "last": last, "parameters": 1000, "seconds": 10.0}
            measured |= {"images": {"train": 1600, "val": 50, "test": 400}, "images_per_second": 5.0}
            method = {"name": "Supervised", "student": {"name": "vit_tiny"}} | changed.get("method", {})
            data = {"dataset": dataset, "image_size": 32, "protocol": protocol, "fold": 0, "fraction": 1.0, "draw": r}
            data |= {"classes": CLASSES, "split": f"s{r}"}
            recipe = {"epochs": 3} | changed.get("recipe", {})
            config = {"method": method, "data": data, "recipe": recipe, "seed": r, "precision": "float32"}
            job = {"plan": "simulated", "arm": arm, "replicate": {"draw": r, "seed": r}, "notebook": "run", "parameters": {}}
            environment = {"device": "a CPU", "commit": "c" * 40, "uncommitted_changes": False}
            documents = {"config": config, "job": job, "environment": environment, "metrics": measured}
            for name, content in documents.items():
                (path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path / folder

    return simulated


@pytest.fixture
def folder(simulated):
    """CSKD 5 points above ViT in every replicate, DeiT as good as ViT give or take 5."""
    base = [0.50, 0.52, 0.54, 0.51, 0.53, 0.55, 0.52, 0.50]
    simulated("teacher", [0.7] * 8)
    simulated("vit", base)
    simulated("deit", [b + d for b, d in zip(base, [0.05, -0.05] * 4, strict=True)])
    return simulated("cskd", [b + 0.05 for b in base])


def test_verdicts_have_a_row_per_contrast_in_the_order_of_the_plan(folder):
    table = tables.verdicts(runs.load(folder), PLAN)
    assert table.claim.tolist() == ["Does it help?", "Does it help?", "Does DeiT help?"]
    assert table.contrast.tolist() == ["CSKD - ViT: than nothing", "CSKD - DeiT: than labels", "DeiT - ViT: than no teacher"]
    assert table.n.tolist() == [8, 8, 8]
    assert table.difference[0].startswith("+5.0 ± ")
    assert table.verdict[0].startswith("helps")
    assert table.verdict[2].endswith("replicates needed)")
    assert table["other sign"].tolist()[0] == "0 of 8"
    assert float(table.p[0]) == pytest.approx(2 / 2**8, abs=1e-3)
    assert set(table["training time"]) == {""}, "nobody has timed this plan"


def test_an_undecided_row_says_what_it_was_powered_for(simulated):
    base = [0.5, 0.52, 0.48, 0.51, 0.49, 0.5, 0.53, 0.47]
    simulated("vit", base)
    frame = runs.load(simulated("deit", [b + d for b, d in zip(base, [0.085, -0.015] * 4, strict=True)]))
    asked = PLAN | {"questions": {"deit": {"ask": "Does it help?", "contrasts": {"than nothing": ["deit", "vit"]}}}}
    said = {}
    for points in range(1, 12):
        plan = asked | {"smallest_difference": points / 100}
        [result] = tables.contrasts(frame, plan).result
        said[points] = tables.verdicts(frame, plan).verdict[0]
        if result.verdict == "undecided":
            enough = result.needed <= 8
            words = f"powered for {points} points" if enough else f"{result.needed} replicates needed"
            assert said[points] == f"undecided ({words})"
    assert any("powered" in words for words in said.values())
    assert any("needed" in words for words in said.values())


def test_a_verdict_follows_from_the_predictions_by_other_code(folder):
    """What an independent reader computes from predictions_last.csv."""
    right = {}
    for arm in ("cskd", "vit"):
        files = [pd.read_csv(folder / f"{arm}-draw{r}-seed{r}" / "predictions_last.csv") for r in range(8)]
        right[arm] = np.array([(of[CLASSES].idxmax(axis=1) == of.label).to_numpy(float) for of in files])
    per_image = right["cskd"] - right["vit"]
    d, N = per_image.mean(1), per_image.shape[1]
    v, w = per_image.mean(0).var(ddof=1) / N, (per_image.var(axis=1, ddof=1) / N).mean()
    shared = max(0, (8 * v - w) / 7)
    variance = d.var(ddof=1) / 8 + shared
    df = variance**2 / ((d.var(ddof=1) / 8) ** 2 / 7 + shared**2 / (N - 1))
    half = stats.t.ppf(1 - 0.05 / 2 / 2, df) * math.sqrt(variance)
    found = tables.contrasts(runs.load(folder), PLAN).result[0]
    assert (found.mean, found.half_width, found.n) == (pytest.approx(d.mean()), pytest.approx(half), 8)
    assert found.differences == pytest.approx(d)


def test_the_order_of_rows_and_packing_change_nothing(folder, tmp_path):
    frame = runs.load(folder)
    expected = tables.verdicts(frame, PLAN)
    pd.testing.assert_frame_equal(tables.verdicts(frame.sample(frac=1, random_state=0), PLAN), expected)
    packing.pack({path.name: path for path in folder.iterdir()}, tmp_path / "packed")
    pd.testing.assert_frame_equal(tables.verdicts(runs.load(tmp_path / "packed"), PLAN), expected)


def test_before_the_planned_replicates_are_finished_there_is_no_verdict_and_no_difference(folder):
    frame = runs.load(folder)
    table = tables.verdicts(frame[(frame.arm != "cskd") | (frame.seed < 3)], PLAN)
    assert table.verdict.tolist()[:2] == ["3 of 8 replicates"] * 2
    assert table.difference.tolist()[:2] == ["", ""]
    assert table.verdict[2].startswith("undecided")
    without = tables.verdicts(frame[frame.arm != "cskd"], PLAN)
    assert without.verdict[0] == "no run of cskd is finished"
    assert len(without) == 3
    assert tables.verdicts(frame, {}).empty


def test_one_replicate_and_equal_scores_have_their_words(simulated):
    simulated("vit", [0.5])
    folder = simulated("cskd", [0.6])
    plan = PLAN | {"replicates": [{"draw": 0, "seed": 0}], "questions": {"one": PLAN["questions"]["one"]}}
    assert tables.verdicts(runs.load(folder), plan).verdict[0] == "no verdict"
    simulated("vit", [0.5] * 3, "equal")
    equal = simulated("cskd", [0.5] * 3, "equal")
    [row] = tables.verdicts(
        runs.load(equal),
        PLAN
        | {
            "replicates": PLAN["replicates"][:3],
            "questions": {"one": {"ask": "?", "contrasts": {"": ["cskd", "vit"]}}},
        },
    ).to_dict("records")
    assert (row["verdict"], row["difference"]) == ("equal", "+0.0 ± 0.0")


def test_folds_are_independent_replicates_whose_seeds_are_averaged(simulated):
    def own(r):
        return [f"fold{r // 2}/{i}" for i in range(400)]

    simulated("vit", [0.5] * 6, ids=own, protocol="grouped")
    folder = simulated("cskd", [0.52, 0.54, 0.56, 0.58, 0.54, 0.56], ids=own, protocol="grouped")
    plan = PLAN | {"replicates": PLAN["replicates"][:6]}
    found = tables.contrasts(runs.load(folder), plan).result[0]
    assert found.n == 3
    assert found.differences == pytest.approx([0.03, 0.07, 0.05])
    sd = 0.02  # of .03, .07, .05; a fold tests 400 images and trains on 1,600
    expected = stats.t.ppf(1 - 0.05 / 4, 2) * sd * math.sqrt(1 / 3 + 1 / 4)
    assert found.half_width == pytest.approx(expected)


def test_test_images_in_the_training_part_do_not_count_and_the_table_says_so(folder, monkeypatch, tmp_path):
    left_out = frozenset(f"test/{i:04}" for i in range(0, 400, 3))
    frame, before = runs.load(folder), tables.contrasts(runs.load(folder), PLAN).result[0]
    monkeypatch.setattr(tables, "excluded", lambda data: left_out if data["protocol"] == "official" else frozenset())
    tables._scored_once.cache_clear()
    after = tables.contrasts(frame, PLAN).result[0]
    kept = np.array([i % 3 > 0 for i in range(400)])
    expected = []
    for r in range(8):
        a, b = (pd.read_csv(folder / f"{arm}-draw{r}-seed{r}" / "predictions_last.csv")[kept] for arm in ("cskd", "vit"))
        expected.append(np.mean(a[CLASSES].idxmax(axis=1) == a.label) - np.mean(b[CLASSES].idxmax(axis=1) == b.label))
    assert after.differences == pytest.approx(expected)
    assert after.differences != before.differences
    scores = frame.assign(score=tables.scores(frame, "accuracy")).set_index(["arm", "replicate"]).score
    assert [scores["cskd"][name] - scores["vit"][name] for name in scores["cskd"].index] == pytest.approx(expected)
    shown = figures.comparison(frame, ["accuracy"]).axes[0].lines
    assert any(sorted(line.get_xdata()) == pytest.approx(sorted(100 * scores["cskd"])) for line in shown)
    assert f"{len(left_out)} test images with a near-duplicate in the training part are left out" in tables.provenance(
        frame, PLAN
    )
    other = frame.assign(path=frame.path.iloc[0])
    monkeypatch.setattr(tables, "excluded", lambda data: frozenset(f"test/airplane/{i:04}" for i in range(9)))
    assert "left out" in tables.provenance(other, PLAN), "none of them is among these images"
    assert " 0 test images with" in tables.provenance(other, PLAN)
    tables._scored_once.cache_clear()


def test_the_committed_list_belongs_to_the_published_split_of_cifar10():
    listed = tables.excluded({"dataset": "cifar10", "protocol": "official"})
    assert len(listed) == 328
    assert all(name.startswith("test/") for name in listed)
    assert not tables.excluded({"dataset": "cifar10", "protocol": "grouped"})
    assert not tables.excluded({"dataset": "digits", "protocol": "official"})


def test_accuracies_show_both_epochs_the_gate_and_the_teachers_lead(folder):
    table = tables.accuracies(runs.load(folder), PLAN).set_index("arm")
    assert table.loc["vit", "accuracy, last epoch"].startswith("52.1 ± ")
    assert table.loc["vit", "training images"] == "80.0 (not learned)"
    assert table.loc["teacher", "training images"] == "95.0"
    assert table.loc["deit", "teacher"] == "teacher"
    assert table.loc["deit", "teacher's lead"].startswith("+17.9 ± ")  # 70 - 52.1, over the plain ViT
    assert table.loc["vit", "teacher's lead"] == ""
    assert set(table.pretrained) == {"no"}


def test_the_teachers_lead_is_that_with_as_many_images(folder):
    frame = runs.load(folder).assign(dataset="digits")  # of which no test image is left out
    fewer = frame.assign(run=frame.run + " 10%", fraction=0.1, last_accuracy=frame.last_accuracy.where(frame.arm == "vit", 0.3))
    table = tables.accuracies(pd.concat([frame, fewer], ignore_index=True), PLAN).set_index("arm")
    assert table.loc["deit", "teacher's lead"].startswith("+17.9 ± ")
    assert table.loc["deit 10%", "teacher's lead"].startswith("-22.1 ± ")  # 30 - 52.1


def test_pretrained_networks_are_named(simulated):
    networks = {"student": {"name": "vit"}, "teacher": {"name": "efficientnet_lite0", "pretrained": True}}
    folder = simulated("deit", [0.5, 0.6], method={"name": "DeiT", **networks})
    assert tables.accuracies(runs.load(folder), PLAN).pretrained.tolist() == ["teacher"]


def test_changes_are_what_an_arm_says_beside_like():
    found = tables.changes(PLAN)
    assert found["deit"] == ("vit", "taught by teacher, method DeiT, alpha 0.5")
    assert found["cskd"] == ("deit", "method CSKD")
    assert found["cskd_local"] == ("cskd", "schedule linear → local, epochs 3 → 9")
    assert found.keys() == {"deit", "cskd", "cskd_local"}


def test_a_teacher_is_replaced_and_not_merged():
    arms = {"a": {"teacher": {"network": "resnet18"}}, "b": {"like": "a", "teacher": "a"}}
    arms |= {"c": {"like": "a", "teacher": {"network": "resnet50"}}, "d": {"like": "b", "options": {"alpha": 1}}}
    assert [tables._resolved(arms, arm)["teacher"] for arm in "bcd"] == ["a", {"network": "resnet50"}, "a"]


def test_ablations_have_the_interval_of_their_question_and_others_their_own(folder):
    frame = runs.load(folder)
    table, asked = tables.ablations(frame, PLAN).set_index("arm"), tables.contrasts(frame, PLAN)
    assert table.loc["cskd", "result"] == asked.result[1]
    assert (table.loc["deit", "question"], table.loc["deit", "result"]) == ("two", asked.result[2])
    assert table.loc["cskd_local", ["n", "result"]].tolist() == [0, None]
    turned = PLAN | {"questions": {"one": {"ask": "?", "contrasts": {"": ["deit", "cskd"]}}}}
    other = tables.ablations(frame, turned).set_index("arm")
    for result in (*table.result, *other.result):
        if result is not None:
            assert np.mean(result.differences) == pytest.approx(result.mean), "a turned row turns every replicate"
    result = tables.contrasts(frame, turned).result[0]
    assert other.loc["cskd", "result"].mean == -result.mean
    assert other.loc["cskd", "verdict"] == f"DeiT {result.verdict}"
    assert other.loc["deit", "question"] == ""
    assert other.loc["deit", "result"].n == 8
    text = tables.readable(table.reset_index())
    assert text.loc[text.arm == "CSKD", "difference"].item() == asked.result[1].text


def test_selection_bias_is_the_difference_to_the_arm_that_is_honest(simulated):
    simulated("hdkd", [0.5, 0.6, 0.7])
    folder = simulated("hdkd_paper", [0.52, 0.63, 0.74], recipe={"protocol": "paper"})
    arms = {"hdkd": {}, "hdkd_paper": {"like": "hdkd", "parameters": {"training": "paper"}}}
    [row] = tables.selection_bias(runs.load(folder), {"metric": "accuracy", "runs": arms}).to_dict("records")
    assert (row["arm"], row["honest"], row["difference"]) == ("hdkd_paper", "hdkd", "+3.0 ± 2.5")
    assert tables.selection_bias(runs.load(folder), {}).empty


def test_training_times_count_the_teacher_and_the_epochs(folder, tmp_path, monkeypatch):
    frame = runs.load(folder)
    assert tables.times(frame, PLAN).loc["deit"].tolist() == [1, 1]  # all runs took ten seconds
    made = frame.assign(synthesis_seconds=np.where(frame.arm == "deit", 25.0, np.nan))
    assert tables.times(made, PLAN).loc["deit"].tolist() == [3.5, 1], "its images were made from the teacher"
    file = tmp_path / "results" / "benchmarks" / "simulated-steps.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images_per_second": {"teacher": 50.0, "vit": 100.0, "deit": 80.0, "cskd": 40.0}}))
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    times = tables.times(frame.assign(epochs=np.where(frame.arm == "cskd", 6, 3)), PLAN)
    assert math.isnan(times.loc["cskd_local"].own), "nobody has timed it"
    assert times.loc["deit"].tolist() == pytest.approx([1.25, 2.0])
    assert times.loc["cskd"].tolist() == pytest.approx([5.0, 2.0])
    assert tables.times(made, PLAN).loc["deit"].tolist() == [3.5, 1], "steps say nothing of images that are made"
    assert tables.verdicts(frame, PLAN)["training time"].tolist() == ["4.5 : 1.0", "4.5 : 3.2", "3.2 : 1.0"]


def test_tables_are_written_as_csv_markdown_and_latex_with_what_they_are_of(folder, tmp_path):
    frame = runs.load(folder)
    tables.write_all(frame, PLAN, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs.csv", *(f"{name}.{kind}" for name in ("verdicts", "accuracies") for kind in ("csv", "md", "tex")),
    }  # fmt: skip
    written = pd.read_csv(tmp_path / "out" / "runs.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(written, frame.drop(columns="path"), check_dtype=False)
    latex = (tmp_path / "out" / "verdicts.tex").read_text()
    assert r"\toprule" in latex
    assert r"\bottomrule" in latex
    assert r"$\pm$" in latex
    assert "±" not in latex
    text = (tmp_path / "out" / "verdicts.md").read_text()
    assert text.rstrip().endswith(tables.provenance(frame, PLAN))


def test_the_provenance_says_what_is_irregular(folder):
    frame = runs.load(folder)
    text = tables.provenance(frame, PLAN)
    assert "cifar10 at 32 px, official split, replicates: draw 0, seed 0; draw 1, seed 1; draw 2" in text
    assert "Accuracy at the last epoch; intervals are simultaneous within a question (95 %)" in text
    assert "Questions changed" not in text
    assert "Trained on" not in text
    count = len(frame)
    frame.loc[1:, "device"] = "NVIDIA H200"
    assert f"Trained on NVIDIA H200 ({count - 1} runs) and {frame.device[0]} (1 run)." in tables.provenance(frame, PLAN)
    irregular = tables.provenance(frame, PLAN | {"questions_changed_after": 3, "mixed": ["its runs are of 2 commits (a, b)"]})
    assert "Questions changed after 3 runs." in irregular
    assert irregular.endswith("Published in spite of: its runs are of 2 commits (a, b).")


def test_the_metrics_of_one_run_stand_side_by_side(finished_run):
    table = tables.metrics(finished_run.metrics)
    assert table.columns.tolist() == ["best epoch, val", "best epoch, test", "last epoch, val", "last epoch, test"]
    assert table.index.tolist() == list(tables.METRICS.values())
    assert table.loc["accuracy", "last epoch, test"] == f"{finished_run.metrics['last']['test']['accuracy']:.3f}"


def test_the_test_scores_of_several_runs_are_those_of_their_chosen_epochs(finished_run):
    best = finished_run.metrics["best"]["test"]
    table = tables.test_scores({"one": finished_run, "again": finished_run})
    assert table.index.tolist() == ["one", "again"]
    assert table.loc["one"].to_dict() == {title: f"{best[key]:.3f}" for key, title in tables.METRICS.items()}


# Metrics of resampled images


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1", "macro_auroc"])
def test_weighted_metrics_are_scikit_learns_on_the_resampled_images(metric):
    random = np.random.default_rng(0)
    labels = random.integers(3, size=90)
    probabilities = random.dirichlet([1, 1, 1], 90).round(1)  # with ties
    probabilities[:, 2] = 1 - probabilities[:, :2].sum(1)
    of = Predictions.of([str(i) for i in range(90)], labels, probabilities)
    counts = random.multinomial(90, np.full(90, 1 / 90), 5)
    for row, value in zip(counts, weighted(metric, of, counts), strict=True):
        again = np.repeat(np.arange(90), row)
        truth, said, shares = labels[again], of.predicted[again], probabilities[again]
        expected = {
            "accuracy": lambda: np.mean(truth == said),  # noqa: B023
            "balanced_accuracy": lambda: recall_score(truth, said, average="macro"),  # noqa: B023
            "macro_f1": lambda: f1_score(truth, said, average="macro"),  # noqa: B023
            "macro_auroc": lambda: np.mean([roc_auc_score(truth == c, shares[:, c]) for c in range(3)]),  # noqa: B023
        }[metric]()
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("metric", tables.METRICS)
def test_metrics_without_weights_are_those_that_runs_report(metric, finished_run, digits):
    probabilities = predict(Supervised(student=finished_run.student("last")), digits.test)
    of = Predictions.of(digits.test.ids, digits.test.labels, probabilities)
    assert weighted(metric, of)[0] == pytest.approx(finished_run.metrics["last"]["test"][metric], abs=2e-6)


def test_a_metric_of_probabilities_is_refused_where_only_classes_are_kept():
    of = Predictions(np.array(["a", "b"]), np.array([0, 1]), np.array([0, 1]), np.array([0.9, 0.8]))
    with pytest.raises(ValueError, match="macro_auroc needs the probabilities of all classes"):
        weighted("macro_auroc", of)
    with pytest.raises(ValueError, match="unknown metric 'acuracy'"):
        weighted("acuracy", of)


def test_detection_is_scikit_learns_auroc_of_the_joint_probability():
    random = np.random.default_rng(1)
    labels, probabilities = random.integers(4, size=80), random.dirichlet(np.ones(4), (2, 80)).round(2)  # with ties
    told = [Predictions.of([str(i) for i in range(80)], labels, of) for of in probabilities]
    table = tables.detection({"vit": told, "one": told[:1]}, ["mel", "nv", "bcc", "df"], ["bcc", "mel"])
    each = [100 * roc_auc_score(np.isin(labels, [0, 2]), (of[:, 0] + of[:, 2]).round(6)) for of in probabilities]
    assert table["AUROC of bcc, mel"].to_dict() == {
        "vit": f"{np.mean(each):.1f} ± {12.706 * abs(each[0] - each[1]) / 2:.1f}",
        "one": f"{each[0]:.1f}",
    }
    with pytest.raises(ValueError, match="positive: no class 'melanoma' here; there are mel, nv, bcc, df"):
        tables.detection({}, ["mel", "nv", "bcc", "df"], ["melanoma"])
    kept = Predictions(told[0].ids, labels, told[0].predicted, told[0].confidence)
    with pytest.raises(ValueError, match="only the predicted class is kept"):
        tables.detection({"vit": [kept]}, ["mel", "nv", "bcc", "df"], ["mel"])


def test_recalls_agree_with_scikit_learn_and_their_intervals_hold_for_other_runs_and_other_images(folder):
    frame = runs.load(folder)
    told = tables.predictions(frame)
    assert list(told) == list(dict.fromkeys(frame.run))
    table = tables.recalls({"cskd": told["cskd"]}, CLASSES).set_index("class")
    each = np.array([recall_score(one.labels, one.predicted, average=None) for one in told["cskd"]])
    n, p = np.bincount(TRUTH), each.mean(0)
    wilson = [stats.binomtest(round(k), int(m)).proportion_ci(method="wilson") for k, m in zip(p * n, n, strict=True)]
    np.testing.assert_allclose(table.recall, p)
    np.testing.assert_allclose(table.low, [of.low for of in wilson], atol=0.005)  # of a rounded count; longer than t here
    np.testing.assert_allclose(table.high, [of.high for of in wilson], atol=0.005)
    far = [told["cskd"][0], told["teacher"][0]]
    unlike = tables.recalls({"both": far}, CLASSES)
    low, high = stats.t.interval(
        0.95, 1, *(f([(o.predicted == 0)[TRUTH == 0].mean() for o in far]) for f in (np.mean, stats.sem))
    )
    assert (unlike.low[0], unlike.high[0]) == (max(low, 0), min(high, 1))
    one = tables.recalls({"cskd": told["cskd"][:1]}, CLASSES).iloc[0]
    right = (told["cskd"][0].predicted == 0)[TRUTH == 0]
    exact = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    assert (one.recall, one.low, one.high) == pytest.approx((right.mean(), exact.low, exact.high))


def test_a_class_without_images_has_no_recall_and_arms_without_predictions_are_left_out(folder):
    frame = runs.load(folder)
    (folder / "vit-draw0-seed0" / "predictions_last.csv").unlink()
    told = tables.predictions(frame)
    assert set(told) == {"teacher", "deit", "cskd"}
    table = tables.recalls({"deit": told["deit"]}, [*CLASSES, "e"])
    assert table[["recall", "low", "high"]].isna().all(axis=1).tolist() == [False] * 4 + [True]


def test_calibration_has_the_bins_of_the_ece(folder):
    random = np.random.default_rng(0)
    told = []
    for _ in range(3):
        probabilities = random.dirichlet([0.5] * 4, 300)
        labels = np.where(random.random(300) < 0.7, probabilities.argmax(1), 0)  # unsure where it is right, and sure where not
        told.append(Predictions.of(range(300), labels, probabilities))
    table = tables.calibration(told[:1])
    assert (table.share * (table.confidence - table.accuracy).abs()).sum() == pytest.approx(weighted("ece", told[0])[0])
    assert table.share.sum() == pytest.approx(1)
    of_three = tables.calibration(told)
    assert ((of_three.low <= of_three.accuracy) & (of_three.accuracy <= of_three.high)).all()
    assert of_three.low.min() >= 0
    assert of_three.high.max() <= 1


def test_a_shown_table_does_not_break_at_its_plus_or_minus():
    table = tables.shown(pd.DataFrame({"difference": ["+5.0 ± 3.2", ""], "n": [8, 2]}))
    assert table.difference.tolist() == ["+5.0\u00a0±\u00a03.2", ""]
    assert table.n.tolist() == [8, 2]
