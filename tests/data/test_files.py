import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from hdkd_lib.data.files import built_aside, existing, find, images_in, unpack
from hdkd_lib.data.sources import open_source

KINDS = {"zip": ".zip", "tar": ".tar", "gztar": ".tar.gz", "xztar": ".tar.xz", "bztar": ".tar.bz2"}


def packed(folder: Path, archive: Path, kind: str = "zip") -> Path:
    return Path(shutil.make_archive(str(archive), kind, folder))


def with_member(archive: Path, name: str, link: str = "", kind: bytes = tarfile.REGTYPE) -> Path:
    """An archive of one good file and one of that name, in a zip or a tar; `kind` says what sort of link it is."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("good.txt", "good")
            opened.writestr(name, "evil")
        return archive
    with tarfile.open(archive, "w") as opened:
        for member, target, sort in (("good.txt", "", tarfile.REGTYPE), (name, link, kind)):
            info = tarfile.TarInfo(member)
            info.linkname, info.type, info.size = target, sort, 0 if target else 4
            opened.addfile(info, io.BytesIO(b"evil"))
        if kind == tarfile.SYMTYPE:
            info = tarfile.TarInfo(f"{name}/evil")
            info.size = 4
            opened.addfile(info, io.BytesIO(b"evil"))
    return archive


# --- archives ---


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_extracted_once_into_the_cache(image_folder, cache, monkeypatch, kind):
    root = image_folder("pack/train/a/1.png", "pack/test/a/2.png")
    archive = packed(root / "pack", root / "images", kind)
    assert archive.name == f"images{KINDS[kind]}"
    source, plain = open_source("folder", archive), open_source("folder", root / "pack")
    assert source.ids == plain.ids
    assert [path.read_bytes() for path in source.images] == [path.read_bytes() for path in plain.images]
    assert all(path.is_relative_to(cache) for path in source.images)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    monkeypatch.setattr(tarfile, "open", None)
    assert open_source("folder", archive).images == source.images
    assert len(list(cache.iterdir())) == 1
    assert {path.name for path in root.iterdir()} == {"pack", archive.name}, "nothing is written beside the archive"


def test_a_changed_archive_is_extracted_anew(image_folder, cache):
    root = image_folder("pack/a/1.png")
    before = unpack(packed(root / "pack", root / "images"))
    image_folder("pack/a/2.png")
    after = unpack(packed(root / "pack", root / "images"))
    assert len(images_in(before)[0]) == 1
    assert len(images_in(after)[0]) == 2


@pytest.mark.parametrize("inside", ["", "own"])
@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_is_found_in_the_data_folder_and_in_the_sets_own(image_folder, cache, kind, inside):
    root = image_folder("pack/x/marked/1.png", "other/1.png")
    data = root / "data"
    (data / inside).mkdir(parents=True)
    packed(root / "other", data / inside / "another", kind)
    packed(root / "pack", data / inside / "marked", kind)
    place = find(data, [("nothing",), ("marked",)], "own", "somewhere")
    assert place.is_relative_to(cache)
    assert [path.name for path in place.rglob("*.png")] == ["1.png"]
    assert len(list(cache.iterdir())) == 1, "the other archive is not extracted"


def test_a_folder_comes_before_an_archive_and_the_sets_own_name_before_others(image_folder, cache):
    root = image_folder("b/marked/1.png", "a/marked/1.png", "own/marked/1.png")
    packed(root / "b", root / "own")
    assert find(root, [("marked",)], "own", "") == root / "own"
    assert find(root, [("marked",)], "else", "") == root / "a"
    shutil.rmtree(root / "own")
    assert find(root, [("marked",)], "own", "") == root / "a"
    assert not cache.exists()


def test_what_is_nowhere_is_named_with_what_was_looked_for(image_folder):
    root = image_folder("a/1.png")
    with pytest.raises(
        FileNotFoundError, match=r"no own in .*: no folder or archive there holds x and y or z; get it from here"
    ):
        find(root, [("x", "y"), ("z",)], "own", "here")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "ABSOLUTE/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leads_out_of_the_folder_writes_nothing_there(tmp_path, cache, kind, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = with_member(tmp_path / f"bad.{kind}", name.replace("ABSOLUTE", str(outside)))
    if kind == "tar" and "ABSOLUTE" in name:  # tar's own rule: the leading slash is dropped
        assert [file.name for file in unpack(archive).rglob("evil")] == ["evil"]  # in the cache, as the last line says
    else:
        with pytest.raises(ValueError, match=r"bad.* would write outside of its folder .*evil.*; it is not extracted"):
            unpack(archive)
        assert list(cache.iterdir()) == []
    assert [p for p in [*tmp_path.rglob("evil"), *cache.parent.rglob("evil")] if not p.is_relative_to(cache)] == []


@pytest.mark.parametrize(("link", "kind"), [("..", tarfile.SYMTYPE), ("OUTSIDE", tarfile.SYMTYPE), ("../x", tarfile.LNKTYPE)])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, cache, link, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = with_member(tmp_path / "bad.tar", "link", link.replace("OUTSIDE", str(outside)), kind)
    with pytest.raises(ValueError, match=r"bad.tar would write outside of its folder .*; it is not extracted"):
        unpack(archive)
    assert list(cache.iterdir()) == list(outside.iterdir()) == []
    assert not (cache.parent / "evil").exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_archive_is_refused_in_a_sentence(tmp_path, cache, kind, keep):
    (tmp_path / "pack").mkdir()
    for i in range(8):
        (tmp_path / "pack" / f"{i}.bin").write_bytes(os.urandom(20_000))
    archive = packed(tmp_path / "pack", tmp_path / "cut", kind)
    archive.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
    with pytest.raises(ValueError, match=rf"cut\{KINDS[kind]} is damaged \((?s:.)*\); get it again"):
        unpack(archive)
    assert list(cache.iterdir()) == []


def test_a_damaged_file_within_an_archive_is_found_by_its_checksum(image_folder, cache):
    root = image_folder("pack/a/1.png")
    pixels = (root / "pack/a/1.png").read_bytes()
    with zipfile.ZipFile(root / "bad.zip", "w") as opened:  # stored, not compressed
        opened.writestr("a/1.png", pixels)
    (root / "bad.zip").write_bytes((root / "bad.zip").read_bytes().replace(pixels, pixels[:-1] + b"x"))
    with pytest.raises(ValueError, match=r"bad.zip is damaged \(Bad CRC.*\); get it again"):
        unpack(root / "bad.zip")
    assert list(cache.iterdir()) == []


# --- folders ---


def test_images_are_sorted_other_files_counted_and_hidden_ones_neither(image_folder):
    root = image_folder("b/deep/2.PNG", "b/1.jpeg", "a.tif", "__MACOSX/._a.jpg.png", ".hidden.png")
    (root / "__MACOSX" / "._1.jpg").write_text("resource fork")
    for other in ("notes.txt", "b/table.csv", "b/no_suffix", ".DS_Store"):
        (root / other).write_text("no image")
    images, others = images_in(root)
    assert [path.relative_to(root).as_posix() for path in images] == ["a.tif", "b/1.jpeg", "b/deep/2.PNG"]
    assert others == 3


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(image_folder, monkeypatch):
    root, scan = image_folder("a/1.png", "b/2.png"), os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # for root, whom no permission stops
    with pytest.raises(OSError, match=r"cannot read the folder .*b: Permission denied"):
        images_in(root)


def test_what_is_built_is_seen_when_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    with built_aside(folder, "write") as aside:
        (aside / "file").write_text("first")
        assert not folder.exists()
        assert aside.parent == folder.parent, "on the same disk, so that it can be renamed"
    assert (folder / "file").read_text() == "first"
    with built_aside(folder, "write") as aside:
        (aside / "file").write_text("second")
    assert (folder / "file").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [(OSError("no space"), OSError, r"cannot write it in .*: no space; free some space or set HDKD_CACHE"),
     (ValueError("wrong"), ValueError, "^wrong$"), (KeyboardInterrupt(), KeyboardInterrupt, None)],
)  # fmt: skip
def test_what_fails_while_it_is_built_leaves_nothing(tmp_path, raised, expected, message):
    def fail(folder: Path) -> None:
        with built_aside(folder, "write it") as aside:
            (aside / "half").write_text("half")
            raise raised

    with pytest.raises(expected, match=message):
        fail(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "gztar", "xztar"])
def test_damage_within_compressed_bytes_is_said_in_the_same_sentence(tmp_path, cache, kind):
    (tmp_path / "pack").mkdir()
    for i in range(30):
        (tmp_path / "pack" / f"{i}.txt").write_text("".join(chr(97 + j * j * i % 23) for j in range(20_000)))
    archive = packed(tmp_path / "pack", tmp_path / "bad", kind)
    whole = archive.read_bytes()
    for start in range(60, len(whole) - 30, len(whole) // 25):
        flipped = bytes(byte ^ 0x5A for byte in whole[start : start + 20])
        archive.write_bytes(whole[:start] + flipped + whole[start + 20 :])
        with pytest.raises(ValueError, match=r"bad.* is damaged \((?s:.)*\); get it again"):
            unpack(archive)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_no_archive_is_no_data_folder(tmp_path):
    (tmp_path / "images.rar").write_text("")
    for root in (tmp_path / "images.rar", tmp_path / "none", tmp_path / "none.zip"):
        with pytest.raises(FileNotFoundError, match=f"no data folder at {root}; correct root= or the variable HDKD_DATA"):
            existing(root, "")
