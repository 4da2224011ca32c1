"What is for teachers: assignments that grade themselves, quizzes, pages for students, and words that keep to the pages"
import json
import os
import re
import subprocess
import sys
from contextlib import closing

import pytest

from . import grade, students
from .notebooks import Runner
from .project import PAGES, ROOT, cells, directive, module_of, run
from .test_pages import anchors, slug

TEACH = grade.TEACH
QUIZZES = sorted(TEACH.glob("quiz_*.ipynb"))
by_assignment = pytest.mark.parametrize("nb", grade.ASSIGNMENTS, ids=lambda nb: nb.stem)
by_quiz = pytest.mark.parametrize("nb", QUIZZES, ids=lambda nb: nb.stem)


# Assignments

def marks(nb) -> dict: return {m[1]: int(m[2]) for source in grade.code_cells(nb) if (m := grade.MARK.match(source))}


@by_assignment
def test_a_solution_differs_in_the_answers_alone(nb):
    ours, theirs = cells(nb), cells(grade.solution_of(nb).with_suffix(".ipynb"))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a["cell_type"] == b["cell_type"]
        if a["cell_type"] == "markdown": assert a["source"] == re.sub(r"\]\(\.\./", "](", b["source"])
        elif mark := grade.MARK.match(a["source"]):
            assert grade.MARK.match(b["source"])[0] == mark[0] and "..." in a["source"]
            calls = [re.findall(r"^(?:assert )?(attempt\(.*\))$", c["source"], flags=re.M) for c in (a, b)]
            assert calls[0] == calls[1] and len(calls[0]) == 1, f"{mark[1]} ends in one attempt, the same in both"
        else: assert a["source"] == b["source"]


@by_assignment
def test_the_points_of_an_assignment_are_a_hundred(nb):
    text = "\n".join(c["source"] for c in cells(nb, "markdown"))
    rubric = {name: int(points) for name, points in re.findall(r"^\| (\w\d) [^|]*\| (\d+) \|", text, flags=re.M)}
    by_hand = {m[1]: int(m[2]) for m in grade.BY_HAND.finditer(text)}
    assert rubric == marks(nb) | by_hand and sum(rubric.values()) == 100
    held = grade.held_back(nb)
    assert set(held) == set(marks(nb)), "every answer has checks that are held back, and none is about an answer that is not there"


@by_assignment
def test_a_solution_has_all_points_and_a_stub_none(nb):
    found, _ = grade.grade(grade.solution_of(nb).with_suffix(".ipynb"))
    assert [(p.name, p.points, p.said) for p in found] == [(name, points, "") for name, points in marks(nb).items()]
    found, by_hand = grade.grade(nb)
    assert all(p.points == 0 and p.said for p in found) and sum(by_hand.values()) == 10


def handed_in(tmp_path, change) -> str:
    "The solution of the first assignment under another name, its cells changed"
    nb = json.loads(grade.solution_of(grade.ASSIGNMENTS[0]).with_suffix(".ipynb").read_text())
    for cell in nb["cells"]: cell["source"] = change("".join(cell["source"]))
    file = tmp_path/"my homework (2).ipynb"
    file.write_text(json.dumps(nb))
    return file


def points(file) -> dict: return {p.name: (p.points, p.said) for p in grade.grade(file)[0]}


def test_checks_come_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "LIMIT", 3)  # the search of A2 never ends with the flow of a cheat
    def cheat(source):
        source = re.sub(r"(def check_\w+\(.*\)):\n", r"\1:\n    return\n", source)
        return "# Answer A1 (14 points)\ndef check_a1(flow): pass\ndef attempt(*_): return True\ndef flow(*_): return 0" if "# Answer A1" in source else source
    found = points(handed_in(tmp_path, cheat))
    assert found["A1"][0] == found["A2"][0] == 0 and "3 seconds" in found["A2"][1] and found["C2"] == (16, "")


def test_a_cell_that_fails_costs_its_own_points(tmp_path):
    found = points(handed_in(tmp_path, lambda s: s.replace("def climb", "raise SystemExit('oops')\ndef climb") if "# Answer C1" in s else s))
    assert found["C1"][0] < 14 and "SystemExit: oops" in found["C1"][1] and found["C2"] == (16, "")


def test_right_here_and_wrong_elsewhere_is_half(tmp_path):
    "An order that is looked up, and not measured"
    found = points(handed_in(tmp_path, lambda s: "# Answer D1 (10 points)\ndef order(step): return getattr(step, 'order', 0)" if "# Answer D1" in s else s))
    assert found["D1"][0] == 5 and found["D1"][1].startswith("held back")


def test_own_cells_run_before_the_answer_behind_them(tmp_path):
    def move(source): return source.replace("    dt = (T if", "    dt = helper(T, a, steps) if steps else (T if") if "# Answer A1" in source else source
    file = handed_in(tmp_path, move)
    assert points(file)["A1"][0] < 7
    nb = json.loads(file.read_text())
    where = next(i for i, c in enumerate(nb["cells"]) if "# Answer A1" in "".join(c["source"]))
    helper = "def helper(T, a, steps): return (T if T.ndim == 0 else T.reshape(T.shape + (1,) * (a.ndim - T.ndim))) / steps"
    nb["cells"].insert(where, dict(cell_type="code", id="mine", metadata={}, outputs=[], execution_count=None, source=helper))
    file.write_text(json.dumps(nb))
    assert points(file)["A1"] == (14, "")


def test_the_command_says_what_it_cannot_grade(tmp_path):
    (tmp_path/"notes.ipynb").write_text("no notebook")
    done = subprocess.run([sys.executable, "-m", "tests.grade", tmp_path/"notes.ipynb", PAGES[0], tmp_path/"nowhere.ipynb"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 3, done.stderr


# Quizzes

@by_quiz
def test_a_quiz_asks_and_answers(nb):
    page = cells(nb)
    stubs = [c["source"] for c in page if re.match(r"answer_\d+ = \.\.\.", c["source"])]
    solutions = [c["source"] for c in page if "<summary>Solution</summary>" in c["source"]]
    assert 6 <= len(stubs) == len(solutions) <= 15
    for k, (stub, solution) in enumerate(zip(stubs, solutions), 1):
        assert re.search(rf"^attempt\(check_{k}, answer_{k}\)$", stub, flags=re.M) and re.search(rf"^attempt\(check_{k}, ", solution, flags=re.M)
    letters = [m[1] for s in solutions if (m := re.search(r'^attempt\(check_\d+, "(\w)"\)', s, flags=re.M))]
    assert max(map(letters.count, letters)) <= .7*len(letters) + .5, f"the right letters are {letters}: whoever guesses one letter is right too often"


def test_there_is_a_quiz_for_every_part():
    assert [nb.stem.removeprefix("quiz_") for nb in QUIZZES] == sorted("theory model evidence control benchmarks use".split())


# The lab

def test_the_lab_runs_on_a_gpu_by_one_line():
    code = [c["source"] for c in cells(TEACH/"lab.ipynb", "code")]
    line, = [source for source in code if re.match(r"device, dtype = ", source)]
    assert line.startswith('device, dtype = "cpu", "float32"') and '"cuda", "bfloat16"' in line and "\n" not in line
    assert not [source for source in code if source != line and re.search(r'"cpu"|float32', source)]


# Words

def test_errors_are_quoted_as_they_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (TEACH/"errors.md").read_text(encoding="utf-8")
    setup, *rest = re.findall(r"^```(?:python)?\n(.*?)\n```$", text, flags=re.M | re.S)
    assert len(rest) >= 30
    space = {}
    exec(setup, space)
    for code, said in zip(rest[::2], rest[1::2]):
        with pytest.raises(Exception) as e: exec(code, dict(space))
        assert f"{type(e.value).__name__}: {e.value}" == said, code


def rows(text: str) -> list: return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_syllabus_knows_every_page_and_what_it_needs():
    text = (TEACH/"syllabus.md").read_text(encoding="utf-8")
    table = {re.search(r"\]\(\.\./(\w+)\.ipynb\)", row[0])[1]: row for row in rows(text) if re.match(r"\[(\d\d|Plots)", row[0])}
    assert table.keys() == {nb.stem for nb in PAGES}
    for page, row in table.items():
        assert all(number < page[:2] for number in re.findall(r"\b\d\d\b", row[1])), f"{page} needs a later page"
    plan = "\n".join(" ".join(row) for row in rows(text) if re.match(r"\*\*\d", row[0]))
    for nb in PAGES: assert f"../{nb.name}" in text, nb.name
    for nb in [*grade.ASSIGNMENTS, TEACH/"lab.ipynb"]: assert f"]({nb.name})" in plan, f"no session has {nb.name}"
    assert len(re.findall(r"^\| \*\*\d", text, flags=re.M)) == 10


def test_where_reading_ends_is_a_heading():
    "`up to *Heading*` in the syllabus is the beginning of a heading of the page named last"
    for line in (TEACH/"syllabus.md").read_text(encoding="utf-8").splitlines():
        page = None
        for found in re.finditer(r"\]\(\.\./(\w+)\.ipynb\)|\b(\d\d) (?:up|to)\b|\b(\d\d) up to|up to \*([^*]+)\*", line):
            if number := found[2] or found[3]: page = next(nb.stem for nb in PAGES if nb.stem.startswith(number))
            elif found[1]: page = found[1]
            elif page: assert any(a.startswith(slug(found[4])) for a in anchors(ROOT/"nbs"/f"{page}.ipynb")), f"{page} has no heading {found[4]!r}"


def test_the_contents_name_everything():
    text = (TEACH/"index.md").read_text(encoding="utf-8")
    for file in [*TEACH.glob("*.ipynb"), *TEACH.glob("*.md")]:
        assert file.name in ("index.md", "bibliography.md", "glossary.md") or f"]({file.name})" in text, file.name


def test_the_clock_of_a_session_adds_up():
    text = (TEACH/"instructor.md").read_text(encoding="utf-8")
    sessions = re.split(r"^## \d+ .*$", text, flags=re.M)[1:]
    assert len(sessions) == 10
    for k, session in enumerate(sessions, 1):
        assert sum(int(row[0]) for row in rows(session) if row[0].isdigit()) == 90, f"session {k} is not 90 minutes"
        for part in ("**On the wall**", "**What goes wrong**", "**Questions**"): assert part in session, f"session {k}: {part}"


# Pages for students

@pytest.mark.parametrize("nb", [*PAGES, *students.FOR_CLASS], ids=lambda nb: nb.stem)
def test_a_students_page_has_no_library_and_no_solutions(nb):
    found = students.student_cells(nb)
    code = [source for kind, source in found if kind == "code"]
    assert not [s for s in code if directive(s, "exports?") or "default_exp" in s]
    text = "\n".join(source for kind, source in found if kind == "markdown")
    assert "<summary>Solution" not in text and text.count("<details>") == text.count("</details>")
    assert sum(bool(re.search(r"^attempt\(", s, flags=re.M)) for s in code) >= 2, "the exercises are there"
    assert not students.unresolved(nb, found)
    if module := module_of(nb): assert sum(f"from odesteer.{module} import *" in s for s in code) == 1
    for link in re.findall(r"\]\((?!\w+:)([^)\s#]+)", text): assert (nb.parent/link).resolve() in (*PAGES, *students.FOR_CLASS), f"{link} is not given out"


def test_what_is_given_out_holds_no_solution(tmp_path):
    done = run(sys.executable, "-m", "tests.students", tmp_path/"class", cwd=ROOT)
    given = sorted((tmp_path/"class").rglob("*"))
    assert len(done.splitlines()) == len(PAGES) + len(students.FOR_CLASS) == sum(p.suffix == ".ipynb" for p in given)
    assert {p.parent.name for p in given} == {"class", "teach"}
    assert not [p for p in given if p.is_file() and "assert attempt(" in p.read_text(encoding="utf-8")]


QUICK = ("11_statistics", "plots")


def test_students_pages_run(tmp_path):
    with closing(Runner(tmp_path, os.environ)) as execute:
        for name in QUICK:
            done = execute(students.write(ROOT/"nbs"/f"{name}.ipynb", tmp_path))
            assert done.returncode == 0, done.stdout
