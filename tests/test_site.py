"The site as nbdev hands it to Quarto: entries of the API, figures, folded code, anchors; and the files that are made beside the pages"
import importlib
import inspect
import json
import re
import sys

import pytest
import yaml

import odesteer as ods

from . import site as made
from .project import MODULES, NOTEBOOKS, PAGES, ROOT, copy_of_sources, run

WHERE = "https://odesteer.github.io/odesteer/"


@pytest.fixture(scope="module")
def processed(tmp_path_factory) -> dict:
    "Page -> its cells as Quarto gets them; nbdev runs export, import and show_doc cells again on the way, but here no opening pictures"
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-W", "ignore", "-c", """
import os, sys
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from nbdev.processors import FilterDefaults
for nb in sorted(Path("nbs").resolve().rglob("*.ipynb")):
    read = read_nb(nb)
    for cell in read.cells:
        if "#| fig-alt: " in cell.source: cell.source = "#| eval: false\\n" + cell.source
    page = FilterDefaults().nb_proc(read)
    page.process()
    write_nb(page.nb, Path(sys.argv[1])/nb.name)
os._exit(0)  # dozens of shells would tidy up for as long again""", folder, cwd=copy_of_sources(folder/"odesteer"))
    def cells(file): return [dict(c, source="".join(c["source"])) for c in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    return {nb: cells(folder/nb.name) for nb in NOTEBOOKS}


def entries(page) -> dict:
    "Heading -> entry of the API"
    shown = ["".join(out["data"]["text/markdown"]) for c in page for out in c.get("outputs", []) if "show_doc(" in c["source"] and "text/markdown" in out.get("data", {})]
    return {re.search(r"^### (.+)$", text, flags=re.M)[1]: text for text in shown}


def test_entries_are_a_signature_words_and_a_table(processed):
    found = {f"{nb.stem}: {name}": text for nb in MODULES for name, text in entries(processed[nb]).items()}
    assert len(found) > 500
    for where, text in found.items():
        signature = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
        assert "](" not in signature, f"{where}: a raw link in the signature"
        assert "Call self as a function" not in text, where
    with_table = [where for where, text in found.items() if "| parameter |" in text]
    assert len(with_table) > 400


def public() -> dict:
    "Each public name and the methods of its class -> the object"
    named = {name: getattr(ods, name) for name in ods.__all__}
    return {where: f for name, sym in named.items() if callable(sym) for where, f in {name: sym, **{f"{name}.{k}": m for k, m in made.methods(sym).items()}}.items()}


@pytest.mark.parametrize("where", public())
def test_public_name_is_documented(where):
    sym = public()[where]
    assert made.docstring(sym), "no docstring"
    bare = [name for name, (_, _, what) in made.parameters(sym).items() if not what]
    assert not bare, f"say what {bare} are, in comments at the ends of their lines"


def test_public_tables_say_what_they_hold():
    tables = [name for name in ods.__all__ if not callable(getattr(ods, name))]
    assert tables and all(made.constant(name) for name in tables)


@pytest.mark.parametrize("module", ods._MODULES)
def test_everything_exported_has_a_docstring(module):
    names = importlib.import_module(f"odesteer.{module}")
    bare = [where for name in names.__all__ if inspect.isclass(sym := getattr(names, name)) or inspect.isfunction(sym)
            for where, f in {name: sym, **{f"{name}.{k}": m for k, m in made.methods(sym).items()}}.items() if not made.docstring(f)]
    assert not bare


def test_an_entry_says_what_the_code_says():
    def given(
        a, b,  # two numbers, as of `max`
        *more,  # others,
        # as many as there are
        sign: str = "+",  # or "-"
        **rest,
    ) -> float:  # their sum | or difference
        "Add or subtract."
    assert made.body(given, "given") == "\n".join([
        "```python", "given(a, b, *more, sign='+')", "```", "", "Add or subtract.", "",
        "| parameter | type | what it is |", "| --- | --- | --- |", "| `a` |  | two numbers, as of `max` |", "| `b` |  | two numbers, as of `max` |",
        "| `*more` |  | others, as many as there are |", '| `sign` | `str` | or "-" |', r"| returns |  | their sum \| or difference |"])


def test_figures_keep_their_alternative_text(processed):
    for nb, page in processed.items():
        for cell in page:
            shows = any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))
            assert not shows or "#| fig-alt: " in cell["source"], f"{nb.stem}: {cell['source'][:80]}"


def test_folded_code_is_folded_on_the_site(processed):
    for nb in PAGES:
        for cell in processed[nb]:
            if cell["cell_type"] != "code": continue
            assert "code-fold: show" not in cell["source"]
            if cell["metadata"].get("jupyter", {}).get("source_hidden"): assert "#| code-fold: true" in cell["source"] or "echo: false" in cell["source"]


def test_links_into_the_api_have_an_anchor(processed):
    anchors = {module: {h.lower() for text in entries(processed[nb]).values() for h in re.findall(r"^####? (.+)$", text, flags=re.M)} for nb, module in MODULES.items()}
    headings = {MODULES[nb]: {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for c in processed[nb] if c["cell_type"] == "markdown" for h in re.findall(r"^#+ (.+)$", c["source"], flags=re.M)} for nb in MODULES}
    lost = set()
    for nb, page in processed.items():
        texts = [c["source"] for c in page if c["cell_type"] == "markdown"] + [*entries(page).values()]
        for module, anchor in re.findall(re.escape(WHERE) + r"(\w+)\.html#([\w.-]+)", "\n".join(texts)):
            if module in anchors and anchor not in anchors[module] | headings[module]: lost.add(f"{nb.stem}: {module}.html#{anchor}")
    assert not lost, lost


def test_what_is_made_is_fresh():
    assert not made.stale(), "run `python -m tests.site`"


def test_sidebar_names_every_page():
    def files(items): return [f for item in items for f in (files(item["contents"]) if "contents" in item else [item["href"]])]
    listed = files(yaml.safe_load((ROOT/"nbs"/"sidebar.yml").read_text())["website"]["sidebar"]["contents"])
    there = {str(p.relative_to(ROOT/"nbs")) for p in (ROOT/"nbs").rglob("*") if p.suffix in (".ipynb", ".md") and "solutions" not in p.parts}
    assert len(listed) == len(set(listed)) and set(listed) == there
