"""Patients declared in a table or by a pattern stay together; what contradicts itself is refused in one sentence."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from hdkd_lib import data
from hdkd_lib.data import leakage
from hdkd_lib.data.groups import with_groups
from hdkd_lib.data.sources import open_source

PATIENTS, EACH = 12, 4


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two classes of random images, each patient with images in both."""
    root, random = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for name in ("ill", "well"):
        for patient in range(PATIENTS):
            for image in range(EACH):
                file = root / name / f"p{patient:02d}" / f"{image}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture
def table(scans):
    """Writes groups.csv from its rows, for one test."""
    file = scans / "groups.csv"

    def write(rows: list[str], header: str = "image,group") -> None:
        file.write_text("\n".join([header, *rows]))

    yield write
    file.unlink(missing_ok=True)


def rows(scans) -> list[str]:
    files = sorted(scans.rglob("*.png"))
    return [f"{file.relative_to(scans).as_posix()},patient {file.parent.name}" for file in files]


def patients(part) -> set[str]:
    return {i.split("/")[1] for i in part.ids}


def apart(loaded) -> bool:
    of = [patients(part) for part in (loaded.train, loaded.val, loaded.test)]
    return not (of[0] & of[1] | of[0] & of[2] | of[1] & of[2])


def test_without_a_declaration_a_patient_is_on_both_sides(scans):
    with pytest.warns(UserWarning, match="if these are patients, pass groups="):
        loaded = data.load("folder", scans, image_size=16)
    assert not apart(loaded)
    assert loaded.card["patients"] == "not known"
    assert loaded.config["groups"] is None


def test_a_pattern_keeps_patients_together(scans):
    for fold in range(2):
        loaded = data.load("folder", scans, image_size=16, groups=r"/(p\d+)/", fold=fold)
        assert apart(loaded)
    assert loaded.card["patients"] == r"declared by the pattern /(p\d+)/"
    assert loaded.card["groups"] == PATIENTS
    assert loaded.config["groups"] == r"/(p\d+)/"


def test_a_table_keeps_patients_together_and_gives_the_split_of_the_pattern(scans, table):
    of_pattern = data.load("folder", scans, image_size=16, groups=r"/(p\d+)/")
    table(rows(scans))
    loaded = data.load("folder", scans, image_size=16)
    assert apart(loaded)
    assert loaded.test.ids == of_pattern.test.ids
    assert loaded.card["patients"] == "declared in groups.csv"
    assert loaded.config["groups"] == ""
    assert loaded.config["split"] != data.load("folder", scans, image_size=16, protocol="random").config["split"]


def test_a_table_may_have_more_columns_the_other_slash_and_rows_twice(scans, table):
    of = [f"{row},7".replace("/", "\\") for row in rows(scans)]
    table([*of, of[0]], "image,group,age")
    assert set(with_groups(open_source("folder", scans)).groups) == {f"patient p{i:02d}" for i in range(PATIENTS)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda of: [*of, "ill/p99/0.png,patient"], r"1 rows of .*groups\.csv name no image, the first is 'ill/p99/0\.png'"),
        (lambda of: of[1:], r"1 of 96 images have no group in .*groups\.csv, the first is ill/p00/0\.png"),
        (lambda of: [f"{of[0].split(',')[0]},", *of[1:]], r"1 of 96 images have no group"),
        (lambda of: [*of, f"{of[0]} again"], r"1 images have two groups in .*groups\.csv, the first is ill/p00/0\.png"),
        (lambda of: [*of, f"{of[0]},1,2,3"], r"groups\.csv cannot be read as a table"),
    ],
)
def test_a_table_that_contradicts_the_folder_is_refused(scans, table, change, message):
    table(change(rows(scans)))
    with pytest.raises(ValueError, match=message):
        data.load("folder", scans, image_size=16)


def test_a_table_without_its_columns_is_refused(scans, table):
    table(rows(scans), "image,patient")
    with pytest.raises(ValueError, match=r"groups\.csv has no column group; its columns must be image and group"):
        data.load("folder", scans, image_size=16)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"/(x\d+)/", "fits 0 of 96 images; it must fit all, and the first that it does not fit is ill/p00/0.png"),
        (r"ill/(p\d+)/", "fits 48 of 96 images"),
        (r"/(p\d*", "is no regular expression"),
        (r"p\d+", "must have one part in parentheses"),
        (r"/(p\d+)/(\d)", "must have one part in parentheses"),
        (r"/p\d+(x?)", "fits 0 of 96 images"),
    ],
)
def test_a_pattern_that_does_not_fit_every_image_is_refused(scans, pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load("folder", scans, image_size=16, groups=pattern)


def test_table_and_pattern_together_are_refused(scans, table):
    table(rows(scans))
    with pytest.raises(ValueError, match=r"would say which images belong together, but .*groups\.csv says them"):
        data.load("folder", scans, image_size=16, groups=r"/(p\d+)/")


def test_the_audit_counts_test_images_whose_patient_is_in_the_training_part(scans, tmp_path, capsys):
    for part, patients in (("train", range(8)), ("test", range(6, 12))):
        for name in ("ill", "well"):
            for patient in patients:
                shutil.copytree(scans / name / f"p{patient:02d}", tmp_path / "set" / part / name / f"p{patient:02d}")
                for file in (tmp_path / "set" / part / name / f"p{patient:02d}").iterdir():
                    random = np.random.default_rng([patient, part == "test", name == "ill", int(file.stem)])
                    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    arguments = [str(tmp_path / "set"), "--out", str(tmp_path / "pairs.csv")]
    with pytest.warns(UserWarning, match="if these are patients"):
        assert leakage.main(arguments) == 0
    assert "patients or other groups: not known" in capsys.readouterr().out
    assert leakage.main([*arguments, "--groups", r"/(p\d+)/"]) == 1
    text = capsys.readouterr().out
    assert "groups: 12\n" in text
    assert f"test images with group in train: {2 * 2 * EACH}\n" in text


def test_a_set_of_arrays_takes_a_pattern_on_its_ids():
    source = with_groups(open_source("digits"), r"^(\d\d)")
    assert len(set(source.groups)) == 18
