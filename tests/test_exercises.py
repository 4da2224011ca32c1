"Exercises that every viewer folds, and that a page can be run past: a stub, a hint, a check and a solution for each"
import re

import pytest

from .project import PAGES, cells, directive


def exercises(nb) -> list:
    "The cells of each exercise of a page, its number first"
    found, inside = [], False
    for cell in cells(nb):
        if cell["cell_type"] == "markdown" and re.search(r"^## Exercises$", cell["source"], flags=re.M): inside = True
        if not inside: continue
        begins = re.search(r"^\*\*(\d)\. \w+\.\*\*", cell["source"], flags=re.M) if cell["cell_type"] == "markdown" else None
        if begins: found.append((int(begins[1]), [cell]))
        elif found: found[-1][1].append(cell)
    return found

def code_of(cell) -> list: return re.findall(r"^```python\n(.*?)^```", cell["source"], flags=re.M | re.S)


@pytest.mark.parametrize("nb", PAGES, ids=lambda nb: nb.stem)
def test_exercises_check_themselves(nb):
    tasks = exercises(nb)
    assert [k for k, _ in tasks] == [*range(1, len(tasks) + 1)] and len(tasks) >= 2
    for k, (task, *rest) in tasks:
        assert "<summary>Hint</summary>" in "".join(c["source"] for c in (task, *rest) if c["cell_type"] == "markdown"), f"exercise {k} has no hint"
        stubs = [c for c in rest if c["cell_type"] == "code" and re.search(r"^attempt\(", c["source"], flags=re.M)]
        assert len(stubs) == 1 and "..." in stubs[0]["source"], f"exercise {k} needs one cell to fill in, that ends in attempt(check, answer)"
        solutions = [c for c in rest if c["cell_type"] == "markdown" and "<summary>Solution</summary>" in c["source"]]
        assert len(solutions) == 1 and rest.index(solutions[0]) > rest.index(stubs[0]), f"exercise {k} needs one solution, behind its stub"
        assert any(re.search(r"^attempt\(", code, flags=re.M) for code in code_of(solutions[0])), f"the solution of exercise {k} is not checked"
    assert any("**" in task["source"] and re.search(r"\*\*\d\. Break\.\*\*", task["source"]) for _, (task, *_) in tasks), "no exercise asks to break something"


@pytest.mark.parametrize("nb", PAGES, ids=lambda nb: nb.stem)
def test_every_viewer_folds_what_is_folded(nb):
    for cell in cells(nb, "markdown"):
        assert ":::" not in cell["source"], "fences with ::: stand as raw text in Jupyter, Colab and on GitHub: use <details>"
        assert cell["source"].count("<details>") == cell["source"].count("</details>") == cell["source"].count("<summary>")
        for body in re.findall(r"</summary>(.*?)</details>", cell["source"], flags=re.S): assert body.startswith("\n\n") and body.endswith("\n\n"), "Markdown inside <details> needs blank lines around it"


@pytest.mark.parametrize("nb", PAGES, ids=lambda nb: nb.stem)
def test_a_page_can_be_run_from_top_to_bottom(nb):
    "On Colab every cell runs: what needs more than the page has must say so and go on"
    for cell in cells(nb, "code"):
        if directive(cell["source"], "eval: *false"): assert re.search(r"^if ", cell["source"], flags=re.M), f"cell {cell['id']} would stop the page on Colab"
