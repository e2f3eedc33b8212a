"""Image folders as people have them: each kind is read, or refused in one sentence."""

import os
import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from hdkd_lib import data

RNG = np.random.default_rng(0)
EACH = 8


def pixels(height: int = 24, width: int = 20, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def fill(folder, count: int = EACH):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(pixels()).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HDKD_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "set" / "a")
    fill(tmp_path / "set" / "b")
    return tmp_path / "set"


def load(root, **options) -> data.Data:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return data.load("folder", root, image_size=16, **options)


def frames(count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(pixels()) for _ in range(count)]


def save_palette(folder) -> None:
    """One with a transparency for every colour, of which PIL warns."""
    Image.fromarray(pixels()).quantize(8).save(folder / "x.png", transparency=bytes(range(8)))


def save_cmyk(folder) -> None:
    Image.fromarray(pixels(channels=4), "CMYK").save(folder / "x.jpg")


def save_turned(folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels()).save(folder / "x.jpg", exif=exif)


def save_16_bits(folder) -> None:
    Image.fromarray(RNG.integers(0, 2**16, (20, 20)).astype(np.uint16)).save(folder / "x.png")


def save_line(folder) -> None:
    Image.fromarray(pixels(1, 1000)).save(folder / "x.png")


def save_with_preview(folder) -> None:
    photograph, preview = frames(2)
    photograph.save(folder / "x.jpg", format="MPO", save_all=True, append_images=[preview])


def save_still_gif(folder) -> None:
    frames(1)[0].save(folder / "x.gif")


def save_mixed_case(folder) -> None:
    Image.fromarray(pixels()).save(folder / "X (1) ä.JpG", format="jpeg")


def save_deeper(folder) -> None:
    fill(folder / "images", 1)


def link_file(folder) -> None:
    fill(folder.parent.parent / "elsewhere", 1)
    (folder / "x.png").symlink_to(folder.parent.parent / "elsewhere" / "0.png")


def link_folder(folder) -> None:
    fill(folder.parent.parent / "elsewhere", 1)
    (folder / "more").symlink_to(folder.parent.parent / "elsewhere")
    (folder / "again").symlink_to(folder)  # a circle


READ = [
    save_palette, save_cmyk, save_turned, save_16_bits, save_line, save_with_preview, save_still_gif, save_mixed_case,
    save_deeper, link_file, link_folder,
]  # fmt: skip


@pytest.mark.parametrize("add", READ)
def test_is_read(root, add):
    add(root / "a")
    loaded = load(root)
    assert loaded.card["classes"] == {"a": EACH + 1, "b": EACH}
    assert len({i for part in (loaded.train, loaded.val, loaded.test) for i in part.ids}) == 2 * EACH + 1


def save_many_in_one(suffix: str):
    def save(folder) -> None:
        first, *rest = frames()
        first.save(folder / f"x{suffix}", save_all=True, append_images=rest)

    save.__name__ = f"save_many_in_one{suffix}"
    return save


def save_dicom(name: str):
    def save(folder) -> None:
        (folder / name).write_bytes(bytes(128) + b"DICM" + bytes(64))

    save.__name__ = f"save_dicom_{name}"
    return save


def save_float(folder) -> None:
    Image.fromarray(RNG.random((20, 20), dtype=np.float32)).save(folder / "x.tif")


def save_12_bits(folder) -> None:
    Image.fromarray(RNG.integers(0, 2**12, (20, 20)).astype(np.uint16)).save(folder / "x.png")


def save_nothing(folder) -> None:
    (folder / "x.png").touch()


def link_nowhere(folder) -> None:
    (folder / "x.png").symlink_to(folder / "nowhere.png")


def add_class_of_three(folder) -> None:
    fill(folder.parent / "c", 3)


def add_class_in_capitals(folder) -> None:
    fill(folder.parent / "A")


def empty_class(folder) -> None:
    (folder.parent / "c").mkdir()


REFUSED = [
    *((save_many_in_one(of), rf"a/x{of} \(3 images in one file; keep one") for of in (".gif", ".webp", ".tif", ".png")),
    (save_dicom("x.dcm"), r"1 DICOM files in .*/a, the first is x\.dcm; write them as PNG first, .* dcm2img"),
    (save_dicom("IM000001"), r"1 DICOM files in .*/a, the first is IM000001"),
    (save_float, r"a/x\.tif \(floating-point pixels; convert them to 8 or 16 bits\)"),
    (save_12_bits, r"the 16-bit images of folder use 12 bits at most \(no pixel is above \d+\)"),
    (save_nothing, r"1 of 17 images cannot be decoded; replace or remove them, or pass on_corrupt='skip':\na/x\.png"),
    (link_nowhere, r"cannot read .*/a/x\.png: No such file or directory; mend or remove it"),
    (add_class_of_three, r"class 'c' has 3 separate images"),
    (add_class_in_capitals, r"the classes A, a in .* differ in upper and lower case only"),
    (empty_class, r"no image in .*/c; remove the folder or fill it"),
]  # fmt: skip


@pytest.mark.parametrize(("add", "message"), REFUSED)
def test_is_refused_in_one_sentence(root, add, message):
    add(root / "a")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(root)
    assert len(str(caught.value).split("\n")) <= 2  # the sentence, and the file
    assert caught.value._render_traceback_()  # shown without the calls


def test_a_turned_photograph_is_upright_and_a_linked_circle_ends(root):
    save_turned(root / "a")
    link_folder(root / "b")
    loaded = load(root)
    assert loaded.signatures.sizes[loaded.source.ids.index("a/x.jpg")].tolist() == [24, 20]
    assert [i for i in loaded.source.ids if "more" in i] == ["b/more/0.png"]


def test_five_hundred_classes_of_six(tmp_path, monkeypatch):
    monkeypatch.setenv("HDKD_CACHE", str(tmp_path / "cache"))
    for c in range(500):
        (tmp_path / "set" / f"{c}").mkdir(parents=True)
        for i in range(6):
            Image.fromarray(pixels(8, 8)).save(tmp_path / "set" / f"{c}" / f"{i}.bmp")
    loaded = load(tmp_path / "set")
    for part in (loaded.train, loaded.val, loaded.test):
        assert part.labels.unique().numel() == 500


def test_folders_of_patients_are_read_and_pointed_at(root):
    for patient in ("p1", "p2"):
        fill(root / "a" / patient, 2)
    message = "such as a/p1, and are not kept together: if these are patients, pass groups='^[^/]+/([^/]+)/'"
    with pytest.warns(UserWarning, match=re.escape(message)):
        data.load("folder", root, image_size=16)
    shutil.rmtree(root / "b")
    os.rename(root / "a", root / "b")
    for part in ("train", "test"):
        shutil.copytree(root / "b", root / part / "a")
    shutil.rmtree(root / "b")
    message = "such as test/a/p1, and are not kept together: if these are patients, pass groups='^[^/]+/[^/]+/([^/]+)/'"
    with pytest.warns(UserWarning, match=re.escape(message)):
        data.load("folder", root, image_size=16)
