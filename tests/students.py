"""`python -m tests.students FOLDER`: every page as a student gets it, made anew from the page; quizzes, assignments and the lab too.

What a page exports is imported from the library; solutions and outputs are gone, hints, checks and stubs are there, checks folded."""
import ast
import builtins
import json
import re
import sys
from pathlib import Path

from .pages import FOLDED, folds
from .project import NOTEBOOKS, PAGES, ROOT, cells, directive, module_of

REPOSITORY = "https://github.com/odesteer/odesteer/blob/main"
FOR_CLASS = [nb for nb in NOTEBOOKS if nb.parent.name == "teach" and not nb.stem.startswith("slides_")]  # the folder of solutions is not given out
GIVEN = {*dir(builtins), "get_ipython", "display", "_", "__name__", "__file__", "__annotations__"}  # names that nobody has to bind


def parsed(source: str) -> ast.Module:
    "The syntax of a cell, without its magics"
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n")))


def used(tree: ast.AST) -> set: return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}


def bound(tree: ast.AST) -> set:
    "All names that some line binds, at the top or in a function"
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names.add(n.name)
        elif isinstance(n, ast.arg): names.add(n.arg)
        elif isinstance(n, ast.ExceptHandler) and n.name: names.add(n.name)
        elif isinstance(n, ast.alias): names.add((n.asname or n.name).split(".")[0])
    return names


def targets(node) -> set:
    "Names in the target of an assignment"
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} if node else set()


def binds(statement: ast.stmt) -> set:
    "Names that a statement at the top of a cell gives a value there; not what it imports, nor what a comprehension or a function keeps to itself"
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return set() if any("patch" in ast.unparse(d) for d in statement.decorator_list) else {statement.name}
    found = set().union(*(targets(t) for t in getattr(statement, "targets", ())), targets(getattr(statement, "target", None)))
    found |= set().union(*(targets(item.optional_vars) for item in getattr(statement, "items", ())))
    inner = [s for part in ("body", "orelse", "finalbody") for s in getattr(statement, part, ())]
    return found.union(*map(binds, inner), *(binds(s) for h in getattr(statement, "handlers", ()) for s in h.body))


def defines(source: str) -> set:
    "What an export cell defines: functions, classes and tables"
    return set().union(*(binds(s) for s in parsed(source).body if isinstance(s, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign))))


def public(module: str) -> set:
    "What `from odesteer.module import *` gives"
    tree = ast.parse((ROOT/"odesteer"/f"{module}.py").read_text(encoding="utf-8"))
    return next(set(ast.literal_eval(s.value)) for s in tree.body if isinstance(s, ast.Assign) and s.targets[0].id == "__all__")


def imports(sources: list, wanted: set) -> list:
    "Lines that import the wanted ones of what these cells import"
    lines = []
    for statement in (s for source in sources for s in parsed(source).body if isinstance(s, (ast.Import, ast.ImportFrom))):
        names = [a for a in statement.names if (a.asname or a.name).split(".")[0] in wanted]
        if not names: continue
        statement.names = names
        lines.append(ast.unparse(statement))
    return [*dict.fromkeys(lines)]


def without_solutions(text: str) -> str:
    "Markdown without what a solution folds"
    return re.sub(r"<details><summary>Solution</summary>.*?</details>\n*", "", text, flags=re.S).strip()


def linked(text: str, page: Path) -> str:
    "Links that lead out of the students' folder lead into the repository"
    def to(link):
        file, _, anchor = link[1].partition("#")
        at = (page.parent/file).resolve()
        if not file or at in PAGES or at in FOR_CLASS: return link[0]
        return f"]({REPOSITORY}/{at.relative_to(ROOT)}{'#' * bool(anchor)}{anchor})"
    text = re.sub(r"^\[!\[Open in Colab\].*\n*", "", text, flags=re.M)
    return re.sub(r"\]\((?!\w+:)([^)\s]+)\)", to, text)


def told(sources: list) -> str:
    "A line that says what the page defines here"
    names = []
    for f in (s for source in sources for s in parsed(source).body if isinstance(s, (ast.FunctionDef, ast.ClassDef))):
        owner = f.args.args and f.args.args[0].annotation if isinstance(f, ast.FunctionDef) and binds(f) == set() else None
        names.append((f"{ast.unparse(owner)}." if owner else "") + f.name)
    shown = [f"`{name}`" for name in names if not name.startswith("_") and "._" not in name]
    return f"*The page writes {', '.join(shown)} here. It is imported; `??` behind a name shows its code.*" if shown else ""


def rebound(source: str, ours: set, module: str) -> str:
    "A cell that gives a name of the library another value gives it to the library as well, whose functions look there"
    tree, lines = parsed(source), source.split("\n")
    for statement in reversed(tree.body):
        for name in sorted(binds(statement) & ours): lines.insert(statement.end_lineno, f"sys.modules['odesteer.{module}'].{name} = {name}")
    return "\n".join(lines)


def student_cells(page: Path) -> list:
    "(kind, source) of each cell of a page as a student gets it"
    module, all_cells = module_of(page), cells(page)
    ours = [c["source"] for c in all_cells if c["cell_type"] == "code" and directive(c["source"], "exports?")]
    kept = [c["source"] for c in all_cells if c["cell_type"] == "code" and not directive(c["source"], "exports?") and not re.match(r"#\|\s*default_exp", c["source"])]
    wanted = set().union(*(used(parsed(source)) for source in kept))
    out, waiting, before, defined, first = [], [], set(), set(), True
    for cell in all_cells:
        source = cell["source"]
        if cell["cell_type"] == "code" and directive(source, "exports?"):
            new = defines(source)
            if first:
                private = sorted(set().union(*map(defines, ours)) & wanted - public(module))
                lines = [f"from odesteer.{module} import *", *([f"from odesteer.{module} import {', '.join(private)}"] if private else [])]
                out.append(("code", "\n".join(["# What this page builds is imported from the library", *imports(ours, wanted), *lines])))
                first = False
            if new & before: out.append(("code", f"from odesteer.{module} import {', '.join(sorted(new & before))}  # the page's own from here on"))
            defined |= new
            waiting.append(source)
        elif re.match(r"#\|\s*default_exp", source): continue
        else:
            if waiting and (note := told(waiting)): out.append(("markdown", note))
            waiting = []
            if cell["cell_type"] == "markdown":
                text = linked(without_solutions(source), page)
                if text: out.append(("markdown", text))
            else:
                again = rebound(source, defined, module) if module else source
                out.append(("code", again if again == source else "import sys\n" + again))
                before |= set().union(*(binds(s) for s in parsed(source).body))
    return out


def unresolved(page: Path, found: list) -> set:
    "Names that a student's page uses and nothing binds"
    trees = [parsed(source) for kind, source in found if kind == "code"]
    star = public(module_of(page)) if module_of(page) else set()
    return set().union(*map(used, trees)) - set().union(*map(bound, trees)) - star - GIVEN


def write(page: Path, folder: Path) -> Path:
    "The student's page in a folder"
    made = []
    for k, (kind, source) in enumerate(student_cells(page)):
        cell = dict(cell_type=kind, id=f"{page.stem[:2]}-{k}", metadata=dict(FOLDED) if kind == "code" and folds(source) else {}, source=source.splitlines(True))
        made.append(cell | (dict(execution_count=None, outputs=[]) if kind == "code" else {}))
    kernel = dict(display_name="python3", language="python", name="python3")
    to = Path(folder)/page.relative_to(ROOT/"nbs")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(dict(cells=made, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return to


def main(folder: str):
    "All pages, and what a class gets, into a folder"
    for page in (*PAGES, *FOR_CLASS): print(write(page, folder))


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("say where to: python -m tests.students FOLDER")
    main(sys.argv[1])
