"""Slides show the figures that the pages have: `python -m tests.slides` fetches them into the decks of nbs/teach, `--check` says which decks are stale

In a deck a cell such as `figure("03_ode", "1a2b3c4d")` stands for the picture that this cell of that page has committed."""
import json
import re
import sys

from .pages import written
from .project import ROOT, cells

DECKS = sorted((ROOT/"nbs"/"teach").glob("slides_*.ipynb"))


def fetched(page: str, cell: str) -> tuple:
    "The alternative text and the outputs of a figure"
    found = next((c for c in cells(ROOT/"nbs"/f"{page}.ipynb", "code") if c["id"] == cell), None)
    if found is None: sys.exit(f"page {page} has no cell {cell}: take the id of one of its figures")
    alt = re.search(r"^#\| fig-alt: .+$", found["source"], flags=re.M)
    pictures = [out for out in found["outputs"] if "image/png" in out.get("data", {})]
    if not alt or not pictures: sys.exit(f"cell {cell} of page {page} shows no figure")
    return alt[0], pictures[:1]


def filled(deck: dict) -> dict:
    "A deck with the figures as they are now"
    for cell in deck["cells"]:
        call = re.search(r'^figure\("(\w+)", "([\w-]+)"\)', "".join(cell["source"]), flags=re.M)
        if cell["cell_type"] != "code" or not call: continue
        alt, outputs = fetched(*call.groups())
        cell["source"] = f"#| eval: false\n#| echo: false\n{alt}\n{call[0]}".splitlines(keepends=True)
        cell["outputs"] = outputs
    return deck


def stale() -> list: return [deck for deck in DECKS if written(filled(json.loads(text := deck.read_text(encoding="utf-8")))) != text]


if __name__ == "__main__":
    found = stale()
    if "--check" in sys.argv: sys.exit(f"{[d.name for d in found]} are stale: run `python -m tests.slides`" if found else 0)
    for deck in found: deck.write_text(written(filled(json.loads(deck.read_text(encoding="utf-8")))), encoding="utf-8")
