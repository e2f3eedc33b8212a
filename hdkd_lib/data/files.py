"""Files and folders: where data lie, archives extracted safely, and what is built aside before it is seen."""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import socket
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


def cache_dir() -> Path:
    """Where decoded images and extracted archives are kept: $HDKD_CACHE, else ~/.cache/hdkd_lib."""
    return Path(os.environ.get("HDKD_CACHE", "~/.cache/hdkd_lib")).expanduser()


def unpack(archive: Path) -> Path:
    """The folder with the archive's files, extracted once into the cache.

    Raises:
        ValueError: it is damaged, or a file in it would land outside of the folder.
        OSError: the disk is full.
    """
    folder = _unpacked(archive)
    if not folder.exists():
        with built_aside(folder, f"extract {archive}") as aside:
            try:
                if zipfile.is_zipfile(archive):
                    with zipfile.ZipFile(archive) as opened:
                        for member in opened.namelist():
                            if Path(member).is_absolute() or ".." in Path(member).parts:
                                raise ValueError(f"{archive} would write outside of its folder ({member}); it is not extracted")
                        opened.extractall(aside)
                else:
                    with tarfile.open(archive) as opened:
                        opened.extractall(aside, filter="data")
                        while opened.fileobj.read(2**20):  # to the end, where the checksum is
                            pass
            except tarfile.FilterError as error:
                raise ValueError(f"{archive} would write outside of its folder ({error}); it is not extracted") from error
            except DAMAGE as error:
                raise ValueError(f"{archive} is damaged ({error}); get it again") from error
    return folder


def _unpacked(archive: Path) -> Path:
    """Where in the cache the archive's files are, once they were extracted."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return cache_dir() / f"archive-{archive.name.split('.')[0]}-{key}"


@contextmanager
def built_aside(folder: Path, what: str) -> Iterator[Path]:
    """A folder beside `folder` to fill, which is then renamed: a half-built one is never seen, the first of two builders wins.

    Raises:
        OSError: the disk is full; nothing is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=building_prefix()))
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        raise OSError(
            f"cannot {what} in {folder.parent}: {error}; free some space or set HDKD_CACHE to another disk"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def building_prefix() -> str:
    """How the name of what this process builds begins, so that others know whose it is."""
    return f".building-{socket.gethostname()}-{os.getpid()}-"


def remove_abandoned(folder: Path, age: float = 7 * 24 * 3600) -> None:
    """Removes what killed processes left half-built in a folder: processes of this machine, and of others if it is `age`
    seconds old."""
    for path in folder.glob(".building-*"):
        with suppress(OSError):  # another process removes it, too, or it is another user's
            owner = re.fullmatch(rf"\.building-{re.escape(socket.gethostname())}-(\d+)-.*", path.name)
            is_left = not _is_running(int(owner[1])) if owner else time.time() - path.stat().st_mtime > age
            if is_left and path.is_dir():
                shutil.rmtree(path)
            elif is_left:
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES) and path.is_file()


def existing(root: Path | None, needed: str) -> Path:
    """The folder `root`, extracted if it is an archive; `needed` says what must lie there and where it is to be had."""
    if root is None:
        raise FileNotFoundError(f"no data folder given; pass root= or set the variable HDKD_DATA: {needed}")
    if is_archive(root):
        return unpack(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}; correct root= or the variable HDKD_DATA")
    return root


def images_in(directory: Path) -> tuple[list[Path], int]:
    """All images below, sorted, and the number of other files; hidden files, which some archives carry, are neither.

    Links are followed; a folder that is reached twice is read once.

    Raises:
        OSError: a folder cannot be read.
        ValueError: DICOM files are there: which of their grey values a reader should see is not for this library to choose.
    """

    def unreadable(error: OSError) -> None:
        raise OSError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    files, seen = [], set()
    for place, folders, names in os.walk(directory, onerror=unreadable, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
        else:
            seen.add(real)
            files += [Path(place, name) for name in names if name[0] != "."]
    if dicom := sorted(filter(_is_dicom, files)):
        raise ValueError(
            f"{len(dicom)} DICOM files in {directory}, the first is {dicom[0].relative_to(directory)}; write them as PNG "
            "first, with the window that a reader would see, for example with dcm2img (dcmj2pnm) of DCMTK"
        )
    images = sorted((f for f in files if f.suffix.lower() in IMAGE_SUFFIXES), key=lambda file: file.parts)
    return images, len(files) - len(images)


def _is_dicom(file: Path) -> bool:
    if file.suffix.lower() in (".dcm", ".dicom"):
        return True
    if file.suffix:
        return False
    with file.open("rb") as opened:  # as scanners name them
        return opened.read(132)[128:] == b"DICM"


def find(root: Path | None, alternatives: list[tuple[str, ...]], dataset: str, obtain: str) -> Path:
    """`root`, a folder in it (the data set's own name first) or an archive there that holds all names of one alternative."""
    wanted = " or ".join(" and ".join(names) for names in alternatives)
    needed = f"{dataset} is a folder or an archive, or lies in one, that holds {wanted}; get it from {obtain}"
    root = existing(root, needed)

    def holds(place: Path) -> bool:
        return any(all(any(place.glob(name)) for name in names) for names in alternatives)

    def by_name(paths: list[Path]) -> list[Path]:
        return sorted(paths, key=lambda path: (not path.name.startswith(dataset), path.name))

    inside = by_name([d for d in root.iterdir() if d.is_dir()])
    for place in (root, *inside):
        if holds(place):
            return place
    own = [d for d in inside if d.name.startswith(dataset)]
    for archive in by_name([a for place in (root, *own) for a in place.iterdir() if is_archive(a)]):
        if any(holds(place) for place in (_unpacked(archive), *_unpacked(archive).glob("*/"))):  # quicker than its listing
            return find(_unpacked(archive), alternatives, dataset, obtain)
        listing = "\n".join(_members(archive))
        if any(all(name.strip("*") in listing for name in names) for names in alternatives):
            return find(unpack(archive), alternatives, dataset, obtain)
    raise FileNotFoundError(f"no {dataset} in {root}: no folder or archive there holds {wanted}; get it from {obtain}")


def _members(archive: Path) -> list[str]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return opened.namelist()
        with tarfile.open(archive) as opened:
            return opened.getnames()
    except DAMAGE as error:
        raise ValueError(f"{archive} is damaged ({error}); get it again") from error
