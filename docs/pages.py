"""Writes the site's sources into a folder: texts and notebooks of the repository, and pages made of results/ and hdkd_lib/.

    python docs/pages.py docs/_build/source

A page keeps its path in the repository (README.md is index.md), so that relative links stay as they are. A link to a file that
is no page leads to a page with its text, or to the file itself where it is data; one to a folder, to a list of its files. A
link that leads nowhere stops the build. Below every block of numbers and every figure stands what it was made of.
"""

import ast
import hashlib
import importlib.util
import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
from outputs import stale

import hdkd_lib
from hdkd_lib import readme, runs, tables

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path("results/published")
PLANS = sorted(path.parent.relative_to(ROOT) for path in (ROOT / PUBLISHED).glob(f"*/{runs.PACKED}"))
TEXTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "results").glob("*.md")),
]
P0 = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "results").glob("*_p0.md"))
CHAPTERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))
REPORTS = {"09_tables": "Tables, executed", "10_figures": "Figures, executed", "08_ablations": "Ablations, executed"}
SOURCE = {".py": "python", ".yaml": "yaml", ".toml": "toml"}  # shown on a page of their own
REPOSITORY = os.environ.get("HDKD_REPOSITORY", "")  # https://HOST/OWNER/NAME
# What the blocks of numbers are made of: plans, or files of results/.
AUDITS = [f"results/audits/{name}" for name in ("brain_tumor", "ham10000")]
BLOCKS = {block: [PUBLISHED / block.split()[1]] for of in readme.TEXTS.values() for block in of if " " in block} | {
    "leaks": [Path(f"{folder}/leakage_gain.csv") for folder in AUDITS],
    "copies": [Path(AUDITS[0]) / "card.json"],
    "earlier": [PUBLISHED / plan for plan in dict.fromkeys(plan for plan, *_ in readme.EARLIER)],
    "commits": [PUBLISHED / plan for plan in dict.fromkeys([*(plan for plan, *_ in readme.EARLIER), "data_efficiency"])],
    "pixels few_images_p0": [PUBLISHED / "few_images_p0" / "pixels.csv"],
}


class Site:
    """The folder `target` of sources: `text`, `notebook` and `plan` write pages, `link` what they link to."""

    def __init__(self, target: Path):
        self.target = target
        self.pages = {Path(name): Path(name) for name in (*TEXTS, *CHAPTERS)} | {Path("README.md"): Path("index.md")}
        self.pages |= {plan: plan / "index.md" for plan in PLANS}

    def write(self, page: Path, text: str) -> None:
        (self.target / page).parent.mkdir(parents=True, exist_ok=True)
        (self.target / page).write_text(text.replace(" ± ", "\u00a0±\u00a0"))  # never broken

    def copy(self, file: Path) -> Path:
        (self.target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, self.target / file)
        return file

    def link(self, to: Path, base: Path) -> str:
        """How a page in the folder `base` links to a file or folder of the repository; what is no page yet becomes one.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if to not in self.pages:
            if (ROOT / to).is_dir():
                self.pages[to] = to / "index.md"
                files = sorted(path.relative_to(ROOT) for path in (ROOT / to).rglob("*") if path.is_file())
                files = [file for file in files if "__pycache__" not in file.parts]
                lines = [f"- [{file.relative_to(to)}]({self.link(file, to)})" for file in files]
                self.write(to / "index.md", "\n".join(["---", "orphan: true", "---", f"# {to.as_posix()}", "", *lines, ""]))
            elif to.suffix in SOURCE:
                self.copy(to)
                self.pages[to] = to.with_name(f"{to.name}.md")
                shown = f"```{{literalinclude}} {to.name}\n:language: {SOURCE[to.suffix]}\n```\n"
                self.write(self.pages[to], f"---\norphan: true\n---\n# {to.as_posix()}\n\n{shown}")
            else:
                self.pages[to] = self.copy(to)
        return Path(os.path.relpath(self.pages[to], base)).as_posix()

    def relinked(self, text: str, base: Path, page_folder: Path) -> str:
        """The text of the repository's folder `base`, for a page in `page_folder`."""

        def turned(found: re.Match) -> str:
            path, mark, anchor = found[1].partition("#")
            if re.match(r"\w+:", found[1]) or not path:
                return found[0]
            to = Path(os.path.normpath(base / path))
            return f"]({self.link(to, page_folder)}{mark}{anchor})"

        parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)  # what is fenced stays as it is
        return "".join(part if i % 2 else re.sub(r"\]\(([^()\s]+)\)", turned, part) for i, part in enumerate(parts))

    def provenance(self, *sources: Path, base: Path) -> str:
        """A line for each plan or file: its name, runs, commits, and the hash of its manifest or of itself."""
        lines = []
        for source in sources:
            if source in PLANS:
                manifest = source / "manifest.json" if (ROOT / source / "manifest.json").exists() else source / runs.PACKED
                of = runs.packed(ROOT / source).values()
                carried = sorted({run["environment"]["commit"][:7] for run in of})
                known = f"[{source.name}]({self.link(source, base)})"
                table = f"[{len(of)} runs]({os.path.relpath(source / 'runs.md', base)})"
                lines.append(f"{known}, {table}, {'commit' if len(carried) == 1 else 'commits'} {', '.join(carried)}")
                lines[-1] += f", {manifest.name} {_hash(manifest)}"
            else:
                lines.append(f"[{source.relative_to('results')}]({self.link(source, base)}) {_hash(source)}")
        return ":::{container} provenance\n" + "; ".join(lines) + "\n:::"

    def text(self, name: str) -> None:
        """A Markdown file of the repository, with what its blocks of numbers are made of."""
        base = Path(name).parent
        text = self.relinked((ROOT / name).read_text(), base, base)
        for block, sources in BLOCKS.items():
            below = f"<!-- end -->\n\n{self.provenance(*sources, base=base)}\n"
            text = re.sub(rf"(<!-- {block} -->\n.*?)<!-- end -->", lambda found: found[1] + below, text, flags=re.DOTALL)  # noqa: B023
        for block, write in EVIDENCE.items() if name == "docs/worse.md" else ():
            text = text.replace(f"<!-- {block} -->", write(self, base))
        self.write(self.pages[Path(name)], text + (NAVIGATION if name == "README.md" else ""))

    def notebook(self, name: str, page: Path, note: str, source: Callable[[str], str]) -> None:
        """An executed notebook with a note below its title; links in a plan's report are those of its chapter.

        Args:
            source: of the code of a cell that shows something: the line to be put below it, or "".
        """
        notebook, cells = nbformat.read(ROOT / name, 4), []
        for cell in notebook.cells:
            cells.append(cell)
            if cell.cell_type == "markdown":
                cell.source = self.relinked(cell.source, Path("notebooks"), page.parent)
                continue
            shown = [
                output for output in cell.outputs if {"text/html", "text/markdown", "image/png"} & output.get("data", {}).keys()
            ]
            alt = [text for output in shown if (text := output.metadata.get("image/png", {}).get("alt"))]
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": "; ".join(dict.fromkeys(alt))}}
            if shown and (below := source(cell.source)):
                cells.append(nbformat.v4.new_markdown_cell(below))
        notebook.cells = cells
        title, _, rest = notebook.cells[0].source.partition("\n")
        notebook.cells[0].source = f"{title}\n\n{note}\n{rest}"
        (self.target / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, self.target / page)

    def chapter(self, name: str) -> None:
        notebook = nbformat.read(ROOT / name, 4)
        commit = notebook.metadata.get("outputs_of", {}).get("commit", "")[:7] or "unknown"
        note = f"Outputs as committed; executed at commit {commit}." + " They are out of date." * bool(stale(notebook))
        note = f":::{{container}} provenance\n{note}\n:::"
        if REPOSITORY.startswith("https://github.com/"):
            there = (
                f"https://colab.research.google.com/github/{REPOSITORY.removeprefix('https://github.com/')}/blob/main/{name}"
            )
            note += f"\n\n[Open in Colab]({there}); it asks for the repository's address, which is {REPOSITORY}."
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        everywhere = re.findall(r"^results: str = .*the published (\w+)", code, re.MULTILINE)  # at the defaults

        def source(code: str) -> str:
            plans = everywhere or re.findall(r'"published" / "(\w+)"', code)
            return self.provenance(*(PUBLISHED / plan for plan in plans), base=Path("notebooks")) if plans else ""

        self.notebook(name, Path(name), note, source)

    def plan(self, folder: Path) -> None:
        """A published plan: questions, verdicts, accuracies, figures, reports, plan.yaml; and a page with its runs."""
        plan, frame = runs.plan(ROOT / folder), runs.load(ROOT / folder)
        finished, source = (ROOT / folder / "tables").exists(), self.provenance(folder, base=folder)
        parts = [f"# {folder.name}", _opening(ROOT / folder / "plan.yaml"), source]
        if (ROOT / "results" / f"{folder.name}.md").exists():
            note = Path("results", f"{folder.name}.md")
            parts.append(f"What came of it: [{note.name}]({self.link(note, folder)}).")
        if not finished:
            done, count = len(frame), len(plan.get("replicates", [0])) * len(plan.get("runs", frame))
            parts += [f"{done} of {count} runs are finished. Test scores are shown when all are, not before."] * (done < count)
        if plan.get("questions"):
            verdicts = tables.verdicts(frame, plan).to_markdown(index=False, disable_numparse=True)
            parts += ["## Questions and verdicts", verdicts, source]
        for table in ("tables/accuracies.md", "tables/selection_bias.md", "ablations/ablations.md"):
            if (ROOT / folder / table).exists():
                title = Path(table).stem.replace("_", " ").capitalize()
                parts += [f"## {title}", (ROOT / folder / table).read_text(), source]
        figures = sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob("*/*.png"))
        parts += ["## Figures"] * bool(figures)
        for figure in figures:
            name = figure.stem.replace("_", " ")
            pdf = self.copy(figure.with_suffix(".pdf")).relative_to(folder)
            parts += [f"![{name} of the plan {folder.name}]({self.copy(figure).relative_to(folder)})"]
            parts += [f"{name.capitalize()} ([PDF]({pdf})).", source]
        students = sorted(path.parent.relative_to(ROOT / folder) for path in (ROOT / folder).glob("students/*/README.md"))
        if students:
            for path in students:
                self.pages[folder / path / "README.md"] = folder / path / "README.md"  # its list of files links to it
                self.write(
                    folder / path / "README.md", f"---\norphan: true\n---\n{(ROOT / folder / path / 'README.md').read_text()}"
                )
            lines = [f"- [{path.name}]({self.link(folder / path, folder)})" for path in students]
            about = 'Weights and model card of one replicate: `timm.create_model("local-dir:FOLDER", pretrained=True)`.'
            parts += ["## Students", about, "\n".join(lines)]
        reports = [name for name in REPORTS if (ROOT / folder / f"{name}.ipynb").exists()]
        for name in reports:
            self.notebook(f"{folder}/{name}.ipynb", folder / f"{name}.ipynb", source, lambda code: source)
        listed = ["Runs <runs>", *(f"{REPORTS[name]} <{name}>" for name in reports)]
        parts += ["## The runs, and what was made of them", "```{toctree}\n:maxdepth: 1\n" + "\n".join(listed) + "\n```"]
        parts += ["## Plan", "```{literalinclude} plan.yaml\n:language: yaml\n```"]
        files = sorted(path.relative_to(ROOT / folder) for path in (ROOT / folder).iterdir() if path.is_file())
        for file in files:
            if file.suffix != ".ipynb":
                self.copy(folder / file)
        hashes = [f"| [{file}]({file}) | {_hash(folder / file)} |" for file in files]
        parts += ["## Provenance", _environments(ROOT / folder), "\n".join(["| file | SHA-256 |", "|---|---|", *hashes])]
        self.write(folder / "index.md", "\n\n".join(part for part in parts if part) + "\n")

        scores = [f"last_{metric}" for metric in tables.METRICS if finished and f"last_{metric}" in frame]
        columns = ["run", "replicate", "method", "student", "epochs", "epoch", *scores, "seconds", "device", "commit"]
        shown = frame[columns].assign(commit=frame.commit.str[:7], seconds=frame.seconds.round().astype(int)).round(3)
        shown = shown.rename(columns={"student": "network", "epoch": "chosen epoch"}).rename(
            columns=lambda name: name.replace("_", " ")
        )
        table = shown.to_markdown(index=False, disable_numparse=True)
        self.write(folder / "runs.md", f"# Runs of {folder.name}\n\n{source}\n\n{table}\n")

    def library(self) -> None:
        """A page for each module of the library."""
        names = ["hdkd_lib", *(module.name for module in pkgutil.walk_packages(hdkd_lib.__path__, "hdkd_lib."))]
        rows = []
        for name in names:
            file = Path(importlib.util.find_spec(name).origin)
            purpose = ast.get_docstring(ast.parse(file.read_text())).split("\n")[0]
            rows.append(f"| [{name}]({name}.md) | {purpose} |")
            automodule = f".. automodule:: {name}\n   :members:\n   :member-order: bysource\n"
            self.write(Path(f"api/{name}.md"), f"# {name}\n\n```{{eval-rst}}\n{automodule}```\n")
        about = "Shapes are (B, C, h, w): batch, channels or classes, height, width."
        table = "\n".join(["| module | what |", "|---|---|", *rows])
        self.write(Path("api/index.md"), f"# Library\n\n{about}\n\n{table}\n" + _toctree("Modules", names))


def _hash(file: Path) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]


def _opening(plan: Path) -> str:
    """What the comment at the head of a plan says of it."""
    lines = plan.read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in comment)


def _environments(folder: Path) -> str:
    """Commits, versions and machines of a plan's runs, as a table."""
    columns = ["commit", "uncommitted_changes", "python", "torch", "torchvision", "timm", "device"]
    frame = pd.DataFrame([run["environment"] for run in runs.packed(folder).values()]).reindex(columns=columns)
    counted = frame.fillna("").astype(str).value_counts(sort=False).reset_index(name="runs")
    counted.columns = [column.replace("_", " ") for column in counted]
    return counted.to_markdown(index=False, disable_numparse=True)


def _rows(site: Site, base: Path, plan: str, arms: list[str], columns: list[str]) -> str:
    """Some arms and columns of a plan's table of accuracies."""
    table = pd.read_csv(ROOT / PUBLISHED / plan / "tables" / "accuracies.csv", dtype=str, keep_default_na=False)
    text = table.set_index("arm").loc[arms, columns].reset_index().to_markdown(index=False, disable_numparse=True)
    return f"{text}\n\n{site.provenance(PUBLISHED / plan, base=base)}"


SCORE = "balanced acc., last epoch"


def teachers(site: Site, base: Path) -> str:
    arms = [f"{arm} {fraction}%" for fraction in (10, 25) for arm in ("teacher", "student", "hdkd")]
    mri = _rows(site, base, "brain_tumor_nano", ["teacher", "student", "hdkd"], ["network", SCORE, "teacher's lead"])
    return f"{_rows(site, base, 'data_efficiency', arms, ['network', SCORE])}\n\n{mri}"


def learned(site: Site, base: Path) -> str:
    """Training accuracy at the last epoch and the figure of test scores, of plan data_efficiency."""
    history = runs.packed_table(ROOT / PUBLISHED / "data_efficiency", "history").groupby("run").last()
    frame = runs.load(ROOT / PUBLISHED / "data_efficiency").assign(name=lambda of: of.path.str.split("/").str[-1])
    frame["training accuracy"] = frame.name.map(history.train_accuracy)
    percent = 100 * frame.groupby(["arm", "fraction"])["training accuracy"].agg(["min", "max"])
    ranges = percent.apply(lambda of: f"{of['min']:.0f} to {of['max']:.0f}", axis=1)
    table = ranges.unstack().loc[["student", "vit", "deit", "cskd", "mhca", "dearkd"]]
    table.columns = [f"{100 * fraction:g} % of the images" for fraction in table]
    figure = PUBLISHED / "data_efficiency" / "figures" / "efficiency.png"
    shown = f"![test score over the number of training images, plan data_efficiency]({site.link(figure, base)})"
    source = site.provenance(PUBLISHED / "data_efficiency", base=base)
    return f"{table.to_markdown(disable_numparse=True)}\n\n{source}\n\n{shown}\n\n{source}"


def weights(site: Site, base: Path) -> str:
    return _rows(site, base, "hdkd_ablations", ["student", "hdkd", "batchmean", "hard", "features_only"], ["network", SCORE])


def trials(site: Site, base: Path) -> str:
    results = ROOT / "results"
    return f"{readme.trials(results, 'few_images_p0')}\n\n{site.provenance(PUBLISHED / 'few_images_p0', base=base)}"


def earlier(site: Site, base: Path) -> str:
    return f"{readme.earlier(ROOT / 'results')}\n\n{site.provenance(*BLOCKS['earlier'], base=base)}"


def curves(site: Site, base: Path) -> str:
    plan = PUBLISHED / "brain_tumor_nano"
    figure = site.link(plan / "figures" / "curves.png", base)
    return f"![training curves, plan brain_tumor_nano]({figure})\n\n{site.provenance(plan, base=base)}"


def leaks(site: Site, base: Path) -> str:
    return f"{readme.leaks(ROOT / 'results')}\n\n{site.provenance(*BLOCKS['leaks'], base=base)}"


# What stands in docs/worse.md at `<!-- NAME -->`.
EVIDENCE = {write.__name__: write for write in (teachers, learned, weights, trials, earlier, curves, leaks)}


def _toctree(caption: str, entries: list[str]) -> str:
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"


NAVIGATION = (
    _toctree("Notebooks", [name.removesuffix(".ipynb") for name in CHAPTERS])
    + _toctree("Results", ["results/README", *(f"{plan}/index" for plan in PLANS), *P0, "results/LOG"])
    + _toctree("Guides", ["docs/worse", "CONTRIBUTING", "CHANGELOG", "docs/clusters", "docs/timm", "docs/glossary"])
    + _toctree("Reference", ["api/index"])
)


def main() -> None:
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    site = Site(target)
    for plan in PLANS:
        site.plan(plan)
    for name in TEXTS:
        site.text(name)
    for name in CHAPTERS:
        site.chapter(name)
    site.library()


if __name__ == "__main__":
    main()
