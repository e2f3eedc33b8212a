"""Are the committed outputs of the notebooks those of the code beside them?

    python docs/outputs.py stamp notebooks/*.ipynb   # after they were executed (`make notebooks`)
    python docs/outputs.py check notebooks/*.ipynb   # `make site CHECK=1`: fails and names each notebook that is out of date

A stamp is three entries in a notebook's metadata: `commit`, the commit of the execution, for readers; `cells`, a hash of its
code cells; and `library`, a hash of all files of hdkd_lib. A notebook is out of date when one of the hashes differs from that
of the files as they are. No history is needed, so a shallow clone or an archive can be checked. Any change of the library
counts, also one that would leave the outputs as they are: whether it does is known only after execution.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def digest(*contents: bytes) -> str:
    """The first 16 digits of a SHA-256 over the contents, each with its length."""
    return hashlib.sha256(b"".join(b"%d:%b" % (len(content), content) for content in contents)).hexdigest()[:16]


def library() -> str:
    """The hash of the library's files, with their names."""
    files = sorted(path for path in (ROOT / "hdkd_lib").rglob("*") if path.suffix in (".py", ".csv"))
    return digest(*(part for file in files for part in (file.relative_to(ROOT).as_posix().encode(), file.read_bytes())))


def cells(notebook: nbformat.NotebookNode) -> str:
    """The hash of a notebook's code cells."""
    return digest(*(cell.source.encode() for cell in notebook.cells if cell.cell_type == "code"))


def stamp(path: Path) -> None:
    """Writes into an executed notebook what its outputs are of."""
    notebook = nbformat.read(path, 4)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    notebook.metadata["outputs_of"] = {"commit": commit, "cells": cells(notebook), "library": library()}
    nbformat.write(notebook, path)


def stale(notebook: nbformat.NotebookNode) -> str:
    """Why the outputs of a notebook are out of date, in words; empty if they are not."""
    of = notebook.metadata.get("outputs_of")
    if not of:
        return "it does not say of which code its outputs are"
    changed = [what for what, now in (("cells", cells(notebook)), ("library", library())) if of[what] != now]
    return f"executed at {of['commit'][:7]}, and since then changed: {', '.join(changed)}" if changed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stamp", "check"))
    parser.add_argument("notebooks", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "stamp":
        for path in arguments.notebooks:
            stamp(path)
        return
    found = {path: stale(nbformat.read(path, 4)) for path in arguments.notebooks}
    lines = [f"{path}: {reason}" for path, reason in found.items() if reason]
    sys.exit("\n".join([*lines, "Outputs are out of date: run `make notebooks` and commit the notebooks."]) if lines else 0)


if __name__ == "__main__":
    main()
