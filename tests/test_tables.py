import pandas as pd
import pytest
from scipy import stats

from hdkd_lib import runs, tables

DIFFERENCE = "Δ balanced acc. to student"


def test_a_summary_has_a_row_per_kind_of_run_with_means_and_intervals(frame):
    table = tables.summary(frame).set_index("run")
    assert table.index.tolist() == ["teacher", "student", "hdkd"]
    assert table.runs.tolist() == [1, 3, 3]
    assert table.parameters.tolist() == ["1,234,567"] * 3
    # student: mean .80, sd .1, t(.975, 2) = 4.3027: half width 4.3027 * .1 / sqrt(3) = .2484
    assert table["balanced acc."].tolist() == ["95.0", "80.0 ± 24.8", "82.0 ± 23.7"]
    assert table["ECE"].tolist() == ["12.5", "12.5 ± 0.0", "12.5 ± 0.0"]


@pytest.mark.parametrize("seed", range(3))
def test_differences_are_paired_by_seed_in_whatever_order_the_rows_come(frame, seed):
    row = tables.summary(frame.sample(frac=1, random_state=seed)).set_index("run").loc["hdkd"]
    # differences .02, .03, .01: mean .02, half width 4.3027 * .01 / sqrt(3) = .0248; t = 3.464, p = .074
    assert (row[DIFFERENCE], row.p) == ("+2.0 ± 2.5", "0.074")


def test_a_replicate_without_its_counterpart_is_left_out_of_the_difference_only(frame):
    missing = frame[(frame.run != "student") | (frame.seed != 1)]
    table = tables.summary(missing).set_index("run")
    # differences .02, .01: mean .015, half width 12.706 * .005 = .0635; t = 3, p = .205
    assert (table.loc["hdkd", DIFFERENCE], table.loc["hdkd", "p"]) == ("+1.5 ± 6.4", "0.2")
    assert table.loc["hdkd", "balanced acc."] == "82.0 ± 23.7"


def test_folds_pair_with_their_own_fold(frame):
    other = frame.assign(fold=1, balanced_accuracy=frame.balanced_accuracy + 0.01 * (frame.run == "hdkd"))
    row = tables.summary(pd.concat([frame, other])).set_index("run").loc["hdkd"]
    assert row.runs == 6
    # six differences of sd .0105: half width 2.5706 * .0105 / sqrt(6) = .0110
    assert row[DIFFERENCE] == "+2.5 ± 1.1"


def test_there_is_no_difference_where_nothing_pairs(frame):
    table = tables.summary(frame).set_index("run")
    assert table.loc["student", DIFFERENCE] == table.loc["student", "p"] == ""
    assert table.loc["teacher", DIFFERENCE] == "+25.0"  # one pair: no interval, no test
    assert table.loc["teacher", "p"] == ""
    without = tables.summary(frame[frame.run != "student"])
    assert set(without[DIFFERENCE]) == set(without.p) == {""}


def test_another_metric_and_baseline_can_be_compared(frame):
    table = tables.summary(frame, baseline="teacher", compare="accuracy").set_index("run")
    assert table.loc["student", "Δ accuracy to teacher"] == "-25.0"


def test_written_tables_hold_every_run_the_summary_and_where_its_numbers_are_from(frame, tmp_path):
    tables.write(frame, tmp_path / "tables")
    runs = pd.read_csv(tmp_path / "tables" / "runs.csv")
    pd.testing.assert_frame_equal(runs, frame.drop(columns="path"))  # a path is of one machine
    summary = pd.read_csv(tmp_path / "tables" / "summary.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(summary, tables.summary(frame).astype(str))
    text = (tmp_path / "tables" / "summary.md").read_text()
    assert "80.0 ± 24.8" in text
    assert "digits at 16 px, grouped split (folds 0), seeds 0, 1, 2, 3 epochs, float32; test part" in text
    assert text.rstrip().endswith(tables.provenance(frame))


def test_the_provenance_says_which_part_chose_the_epoch_and_when_that_is_optimistic(frame):
    optimistic = "epoch chosen on test (the paper's protocol: optimistic);"
    assert "epoch chosen on validation;" in tables.provenance(frame)
    assert optimistic in tables.provenance(frame.assign(selection="test"))
    mixed = tables.provenance(frame.assign(selection=["test", *["validation"] * 6]))
    assert "epoch chosen on test (the paper's protocol: optimistic) and validation;" in mixed
    column = tables.summary(frame.assign(selection=["test", *["validation"] * 6]))["epoch chosen on"]
    assert column.tolist() == ["test (the paper's protocol: optimistic)", "validation", "validation"]


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


# Ablations

SCORES = {(0, 0): 0.70, (1, 0): 0.80, (0, 1): 0.90, (1, 1): 0.60}  # of the reference, by seed and fold
NETWORKS = {"student": {"name": "hdkd_student"}, "teacher": {"name": "hdkd_teacher"}}


@pytest.fixture
def ablated(tmp_path):
    """`ablated(kind, differences, **changes)`: writes runs that differ so from SCORES, gives the frame of all."""

    def ablated(kind: str, differences: dict, student=(), teacher=(), recipe=(), **method):
        networks = {key: NETWORKS[key] | dict(own) for key, own in (("student", student), ("teacher", teacher))}
        for (seed, fold), difference in differences.items():
            data = {"dataset": "digits", "image_size": 16, "protocol": "grouped", "fold": fold, "fraction": 1.0}
            config = {"method": {"name": "HDKD", "alpha": 0.5, **networks, **method}, "data": data, "seed": seed}
            config |= {"recipe": {"epochs": 3, "lr": 0.002, **dict(recipe)}, "precision": "float32"}
            measured = {"epoch": 2, "test": {"balanced_accuracy": SCORES[seed, fold] + difference, "accuracy": 0.5}}
            metrics = {"best": measured, "last": measured, "parameters": 1, "seconds": 1.0, "images_per_second": 1.0}
            run = runs.Run.create(tmp_path / f"{kind}-seed{seed}-fold{fold}", config)
            runs.write_json(run.path / "metrics.json", metrics)
            runs.write_json(run.path / "environment.json", {"device": "a CPU"})
        return runs.load(tmp_path)

    ablated("hdkd", dict.fromkeys(SCORES, 0.0))
    return ablated


GAINS = dict(zip(SCORES, (0.02, 0.03, 0.01, 0.04), strict=True))


def test_ablations_name_what_changed_and_put_other_methods_last(ablated):
    ablated("both", GAINS, student={"gate": "se"}, teacher={"gate": "se"})
    ablated("teacher", GAINS, teacher={"gate": "se"})
    ablated("cskd", GAINS, name="CSKD", alpha=0.9)
    ablated("two", GAINS, alpha=0.75, recipe={"lr": 0.001})
    frame = ablated("alpha", GAINS, alpha=0.75)
    table = tables.ablations(frame)
    assert table[["run", "parameters", "change"]].to_numpy().tolist() == [
        ["alpha", "alpha", "alpha 0.5 → 0.75"],
        ["two", "alpha, lr", "alpha 0.5 → 0.75, lr 0.002 → 0.001"],
        ["both", "gate", "gate default → se"],
        ["teacher", "teacher_gate", "teacher gate default → se"],
        ["cskd", "method", "CSKD, cskd"],
    ]
    assert tables.ablations(frame, reference="both").set_index("run").change["hdkd"] == "gate se → default"
    alone = frame[(frame.run == "hdkd") & (frame.seed == 0) | (frame.run == "alpha") & (frame.seed == 1) | (frame.run == "two")]
    assert tables.ablations(alone).run.tolist() == ["two"]  # where no seed and fold is shared there is no difference
    with pytest.raises(ValueError, match="no run is named 'hdkk'; there are alpha, both, cskd, hdkd, teacher, two"):
        tables.ablations(frame, reference="hdkk")


@pytest.mark.parametrize("seed", range(3))
def test_ablations_pair_by_seed_and_fold_and_control_false_discoveries(ablated, seed):
    ablated("worse", {key: gain - 0.05 for key, gain in GAINS.items()}, alpha=0.25)
    ablated("equal", dict(zip(SCORES, (-0.1, 0.1, 0.05, -0.06), strict=True)), alpha=0.6)
    ablated("once", {(1, 0): 0.1}, alpha=0.8)
    frame = ablated("better", GAINS, alpha=0.75).sample(frac=1, random_state=seed)
    table = tables.ablations(frame).set_index("run")
    # differences .02, .03, .01, .04: mean .025, sd .0129, half width 3.1824 * .0129 / 2 = .0205; t = 3.873, p = .0305
    row = table.loc["better", ["runs", "mean", "difference", "difference_half_width", "p"]]
    assert row.tolist() == pytest.approx([4, 0.775, 0.025, 0.0205, 0.0305], abs=1e-4)
    assert table.loc["worse", "difference"] == pytest.approx(-0.025)
    once = table.loc["once"]
    assert (once.runs, once["mean"], once.difference) == (1, pytest.approx(0.9), pytest.approx(0.1))
    assert once[["half_width", "difference_half_width", "p", "q"]].isna().all()
    tested = table.drop("once")
    assert tested.q.tolist() == pytest.approx(stats.false_discovery_control(tested.p).tolist())
    assert set(tables.ablations(frame, compare="accuracy")["difference"]) == {0}


def test_written_ablations_hold_the_numbers_and_a_readable_table_with_its_provenance(ablated, tmp_path):
    ablated("once", {(1, 0): 0.1}, alpha=0.8)
    frame = ablated("better", GAINS, alpha=0.75)
    table = tables.ablations(frame)
    tables.write_ablations(table, tmp_path / "new" / "tables", frame)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "tables" / "ablations.csv"), table)
    text = (tmp_path / "new" / "tables" / "ablations.md").read_text()
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert header == ["run", "change", "runs", "balanced acc.", "Δ", "p", "q"]
    assert rows == [
        ["better", "alpha 0.5 → 0.75", "4", "77.5 ± 18.9", "+2.5 ± 2.1", "0.03", "0.03"],
        ["once", "alpha 0.5 → 0.8", "1", "90.0", "+10.0", "", ""],
    ]
    assert text.endswith(f"\n\n{tables.provenance(frame)}\n")


def test_optimism_is_the_difference_to_the_run_that_differs_in_the_protocol_alone(ablated):
    ablated("alpha", GAINS, alpha=0.75)
    ablated("alpha_paper", dict.fromkeys(SCORES, 0.05), alpha=0.75, recipe={"protocol": "paper"})
    frame = ablated("lonely_paper", GAINS, alpha=0.25, recipe={"protocol": "paper"})
    [row] = tables.optimism(frame).to_dict("records")
    assert (row["run"], row["honest"], row["Δ"]) == ("alpha_paper", "alpha", "+2.5 ± 2.1")
    expected = {"chosen on test": 0.05, "last epoch": 0.05, "chosen on validation": 0.025}
    assert {name: row[name].split()[0] for name in expected} == {
        name: f"{100 * (sum(SCORES.values()) / len(SCORES) + gain):.1f}" for name, gain in expected.items()
    }
    assert tables.optimism(frame[frame.selection == "validation"]).empty
