"""The built site: links lead somewhere and numbers say what they are made of. Notebooks out of date are noticed."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PLANS = sorted(path.parent.name for path in (ROOT / "results" / "published").glob("*/runs.json.xz"))


def dead_links(site: Path) -> list[str]:
    """Links, images, scripts and styles of all pages that lead to no file or anchor of the site."""
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc:
                continue
            file = path if not to.path else Path(os.path.normpath(path.parent / unquote(to.path)))
            anchor = unquote(to.fragment)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def unexplained(page: str, start: str = "<table|<img") -> list[str]:
    """Tables and figures of a page that are not followed by a plan's runs, their commits and the hash of its manifest."""
    article = page[page.index("<article") : page.index("</article>")].split('id="the-runs')[0]
    blocks = [block for block in re.split(f"(?={start})", article)[1:] if re.search("<table|<img", block)]
    source = r'class="provenance.*?href="[^"]*runs\.html".*? runs</.*?commits? [0-9a-f]{7}.*?json(?:\.xz)? [0-9a-f]{12}'
    return [block.partition(">")[0] + ">" for block in blocks if not re.search(source, block, re.DOTALL)]


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.images = set(), set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        of = dict(attributes)
        self.links |= {of[key] for key in ("href", "src") if of.get(key)} - {"#"}
        self.images += [of] if tag == "img" else []
        self.anchors |= {of[key] for key in ("id", "name") if of.get(key)}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, with warnings as errors."""
    pytest.importorskip("sphinx_book_theme", reason="make site installs it")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (
        ["docs/pages.py", folder / "source"],
        ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", folder / "source", folder / "html"],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=environment)
    return folder / "html"


@pytest.mark.slow
class TestSite:
    def test_every_link_leads_somewhere(self, site):
        assert not dead_links(site)

    def test_every_notebook_plan_and_module_has_a_page_that_the_navigation_names(self, site):
        named = (site / "index.html").read_text()
        pages = [f"{path.relative_to(ROOT).with_suffix('.html')}" for path in ROOT.glob("notebooks/*.ipynb")]
        pages += [f"results/published/{plan}/index.html" for plan in PLANS]
        assert not [page for page in [*pages, "api/index.html", "docs/glossary.html"] if f'href="{page}"' not in named]
        modules = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("hdkd_lib/**/*.py")]
        names = [".".join(module.parts).removesuffix(".__init__") for module in modules]
        assert not [name for name in names if not (site / "api" / f"{name}.html").exists()]

    @pytest.mark.parametrize("plan", PLANS)
    def test_every_table_and_figure_of_a_plan_is_followed_by_what_it_is_made_of(self, site, plan):
        assert not unexplained((site / "results" / "published" / plan / "index.html").read_text())

    @pytest.mark.parametrize("chapter", ["08_ablations", "09_tables", "10_figures"])
    def test_what_a_chapter_shows_of_a_plan_is_followed_by_what_it_is_made_of(self, site, chapter):
        assert not unexplained((site / "notebooks" / f"{chapter}.html").read_text(), '<div class="cell_output')

    def test_every_figure_of_a_notebook_has_an_alternative_text(self, site):
        figures = [image for page in site.glob("notebooks/*.html") for image in Page(page).images if "_images" in image["src"]]
        assert len(figures) > 20
        assert not [image for image in figures if len(image.get("alt", "")) < 20 or "png" in image["alt"]]


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="x"></h1><a href="a.html#x"></a><a href="https://example.org"></a>')
    assert not dead_links(tmp_path)
    (tmp_path / "b.html").write_text('<img src="c.png"><a href="a.html#y"></a><a href="#z"></a>')
    assert sorted(dead_links(tmp_path)) == ["b.html: #z", "b.html: a.html#y", "b.html: c.png"]


def test_a_figure_without_its_source_is_noticed():
    source = '<div class="provenance"><a href="runs.html">10 runs</a>, commit 1234567, manifest.json 0123456789ab</div>'
    page = '<article><table></table>{}<img src="a.png">{}<h2 id="the-runs"></h2><table></table></article>'
    assert not unexplained(page.format(source, source))
    assert unexplained(page.format(source, "")) == ['<img src="a.png">']
    assert unexplained(page.format("", source)) == ["<table>"]
    assert unexplained(page.format(source.replace("1234567", "unknown"), source)) == ["<table>"]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A repository with a module and an executed notebook."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "hdkd_lib").mkdir()
    shutil.copy(ROOT / "docs" / "outputs.py", tmp_path / "docs")
    (tmp_path / "hdkd_lib" / "losses.py").write_text("weight = 1\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A"), nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    return tmp_path


def outputs(clone: Path, what: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "docs/outputs.py", what, "a.ipynb"], cwd=clone, capture_output=True, text=True)


def rewrite(clone: Path, kind: str, source: str) -> None:
    notebook = nbformat.read(clone / "a.ipynb", 4)
    next(cell for cell in notebook.cells if cell.cell_type == kind).source = source
    nbformat.write(notebook, clone / "a.ipynb")


def test_outputs_are_those_of_the_code_until_cells_or_the_library_change(clone):
    assert "a.ipynb: it does not say of which code" in outputs(clone, "check").stderr
    assert outputs(clone, "stamp").returncode == 0
    assert outputs(clone, "check").returncode == 0
    rewrite(clone, "markdown", "# B")
    assert outputs(clone, "check").returncode == 0

    rewrite(clone, "code", "1 + 2")
    answer = outputs(clone, "check")
    assert answer.returncode == 1
    assert "changed: cells\n" in answer.stderr
    assert "make notebooks" in answer.stderr
    outputs(clone, "stamp")
    (clone / "hdkd_lib" / "losses.py").write_text("weight = 2\n")
    assert "changed: library\n" in outputs(clone, "check").stderr
