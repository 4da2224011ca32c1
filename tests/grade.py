"""`python -m tests.grade assignment.ipynb ...`: run students' notebooks and print their points, part by part.

An answer's points are half for the check that stands in the assignment, half for those in `nbs/teach/solutions`. Checks are taken from the
repository and not from the student's file, whose cells run here: use an account that may be broken."""
import contextlib
import inspect
import io
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from .project import ROOT, cells

TEACH = ROOT/"nbs"/"teach"
ASSIGNMENTS = sorted(TEACH.glob("assignment_*.ipynb"))
MARK = re.compile(r"# Answer (\w+) \((\d+) points\)\n")
LIMIT = 120  # seconds for a cell, and for a check
BY_HAND = re.compile(r"\*\*Answer (\w+) \((\d+) points, read by a person\)")


@dataclass
class Points:
    "What an answer has earned, and why not more"
    name: str  # such as A1
    points: float  # earned
    of: int  # to be had
    said: str = ""  # the first check that is not met


def solution_of(assignment: Path) -> Path: return TEACH/"solutions"/assignment.name.replace("assignment", "solution")


def held_back(assignment: Path) -> dict:
    "The checks that students do not see, each by the answer that it is about; their parameters are names that the notebook defines"
    space, found = {}, {}
    file = solution_of(assignment).with_suffix(".py")
    exec(compile(file.read_text(encoding="utf-8"), file.name, "exec"), space)
    for name, check in space.items():
        if re.match(r"[A-Z]\d_", name): found.setdefault(name.partition("_")[0], []).append(check)
    return found


def code_cells(nb: Path) -> list: return [cell["source"].strip() for cell in cells(nb, "code")]


def assignment_of(nb: Path) -> Path:
    "The assignment that a student's notebook answers, by its title: files are renamed"
    try: titles = [re.match(r"# Assignment \d[^\n]*", cell["source"]) for cell in cells(nb, "markdown")]
    except (OSError, ValueError, KeyError, TypeError) as e: raise ValueError(f"{nb} is no notebook: {type(e).__name__}: {e}") from None
    title = next((t[0].strip() for t in titles if t), None)
    for assignment in ASSIGNMENTS:
        if title and cells(assignment, "markdown")[0]["source"].startswith(title + "\n"): return assignment
    raise ValueError(f"{nb} has none of the assignments' titles: keep the first cell as it was")


def interleaved(assignment: Path, student: list):
    "The assignment's code cells, each answer as the student gave it, behind the student's own cells before it"
    given, own, waiting = {}, {}, []
    shipped = set(code_cells(assignment))
    for source in student:
        mark = MARK.match(source + "\n")
        if mark: given[mark[1]], own[mark[1]], waiting = source, waiting, []
        elif source not in shipped: waiting.append(source)
    for source in code_cells(assignment):
        mark = MARK.match(source)
        if mark: yield mark, source, [*own.get(mark[1], []), given.get(mark[1], "")]
        else: yield None, source, []


@contextlib.contextmanager
def limited():
    "End what takes longer than LIMIT seconds, where the system has an alarm"
    def ring(*_): raise TimeoutError(f"not done after {LIMIT} seconds")
    if not hasattr(signal, "SIGALRM"): return (yield)
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(source: str, space: dict) -> str:
    "Run a cell, and say what went wrong"
    lines = [line for line in source.split("\n") if not re.match(r"\s*[%!]|(assert )?attempt\(", line)]
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()): exec(compile("\n".join(lines), "<cell>", "exec"), space)
    except (Exception, SystemExit) as e: return f"{type(e).__name__}: {e}".split("\n")[0][:160]
    return ""


def verdict(check, space: dict, names=None) -> str:
    "What a check says, nothing if it is met; its answers are looked up by name"
    try:
        answers = [space[name] for name in (names or inspect.signature(check).parameters)]
        if any(answer is ... for answer in answers): return "no answer yet"
        with limited(), contextlib.redirect_stdout(io.StringIO()): check(*answers)
    except Exception as e: return (str(e).split("\n")[0] or type(e).__name__)[:160]
    return ""


def grade(nb: Path) -> tuple:  # a list of Points, and the points that a person gives, by answer
    "The points of a student's notebook"
    assignment = assignment_of(nb)
    space, found, hidden, checks = {"__name__": "__main__"}, [], held_back(assignment), {}
    for mark, source, answer in interleaved(assignment, code_cells(nb)):
        if mark is None:
            if "google.colab" not in source: run(source, space)
            checks |= {name: space[name] for name in re.findall(r"^def (check_\w+)", source, flags=re.M)}
            continue
        said = [run(cell, space) for cell in answer]
        check, *names = re.search(r"^attempt\((.*)\)$", source, flags=re.M)[1].split(", ")
        own = verdict(checks[check], space, names)
        others = [verdict(check, space) for check in hidden.get(mark[1], [])]
        points = int(mark[2])*(1 if not others else .5)*(not own) + (int(mark[2])/2*others.count("")/len(others) if others else 0)
        first = next((text for text in (said[-1], own, *(f"held back: {text}" for text in others if text)) if text), "")
        found.append(Points(mark[1], points, int(mark[2]), first))
    people = {m[1]: int(m[2]) for cell in cells(assignment, "markdown") for m in BY_HAND.finditer(cell["source"])}
    return found, people


def report(nb: Path) -> str:
    "The points of a notebook as lines to be read"
    found, people = grade(nb)
    lines = [f"{p.name:4} {p.points:5.1f} of {p.of:2}  {p.said or 'right'}" for p in found]
    total = f"     {sum(p.points for p in found):5.1f} of {sum(p.of for p in found)}"
    return "\n".join([nb.name, *lines, total + "".join(f"; {name}: {n} more, read by a person" for name, n in people.items())])


def main(files: list) -> int:
    "The exit code: 2 where a file cannot be graded"
    if not files: sys.exit("say which notebooks: python -m tests.grade assignment.ipynb ...")
    bad = 0
    for file in files:
        try: print(report(Path(file)), end="\n\n")
        except ValueError as e: print(e, file=sys.stderr); bad = 2
    return bad


if __name__ == "__main__":
    import matplotlib
    matplotlib.use("Agg")
    sys.exit(main(sys.argv[1:]))
