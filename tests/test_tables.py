import pandas as pd
import pytest

from hdkd_lib import tables

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
    assert "epoch chosen on test and validation (the paper's protocol: optimistic);" in mixed


def test_the_metrics_of_one_run_stand_side_by_side(finished_run):
    table = tables.metrics(finished_run.metrics)
    assert table.columns.tolist() == ["best epoch, val", "best epoch, test", "last epoch, val", "last epoch, test"]
    assert table.index.tolist() == list(tables.METRICS.values())
    assert table.loc["accuracy", "last epoch, test"] == f"{finished_run.metrics['last']['test']['accuracy']:.3f}"
