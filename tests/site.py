"""What nbdev is told about the site (settings.ini names it), and the two files beside the pages that are made: `python -m tests.site`

An entry of the API is a signature that one can copy, the docstring, and a table of parameters. nbs/api.md has one for each public name,
nbs/sidebar.yml lists the pages as the home page does. `--check` says whether the two are fresh."""
import ast
import importlib
import inspect
import re
import sys
import textwrap
from dataclasses import is_dataclass
from itertools import takewhile

import yaml
from fastcore.docments import docments
from nbdev.showdoc import BasicMarkdownRenderer

from .project import MODULES, ROOT, cells

EMPTY = inspect.Parameter.empty


# One entry

def code_of(sym):
    "What carries the parameters: the function behind a property or a class method, or the class"
    sym = getattr(sym, "fget", None) or getattr(sym, "__func__", None) or sym
    return getattr(sym, "__init__", sym) if inspect.isclass(sym) and "__init__" in vars(sym) else sym


def comments(sym) -> dict:
    """Name -> comment at the end of the line that names the parameter (several names of one line share it); `return` -> that of what it returns

    A comment goes on in the lines below that are nothing else."""
    try: source = textwrap.dedent(inspect.getsource(sym if is_dataclass(sym) else code_of(sym)))
    except (OSError, TypeError): return {}
    tree, lines = ast.parse(source).body[0], source.split("\n")
    if isinstance(tree, ast.ClassDef): named = {n.target.id: n.lineno for n in tree.body if isinstance(n, ast.AnnAssign)}
    elif not isinstance(tree, ast.FunctionDef): return {}
    elif tree.returns and tree.returns.end_lineno == tree.lineno: named = {"return": tree.lineno}
    else:
        a = tree.args
        named = {arg.arg: arg.lineno for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg}
        end = tree.returns.end_lineno if tree.returns else tree.body[0].lineno - 1
        if lines[end - 1].lstrip().startswith(")"): named["return"] = end
    def said(line):
        first, rest = re.search(r"\s# (.+)$", lines[line - 1]), takewhile(lambda below: below.lstrip().startswith("# "), lines[line:])
        return first and " ".join([first[1], *(below.strip()[2:] for below in rest)])
    return {name: what for name, line in named.items() if (what := said(line))}


def parameters(sym) -> dict:
    "Name -> (type, default, what it is), of everything that can be given"
    target = sym if inspect.isclass(sym) else code_of(sym)
    try: sig = inspect.signature(target)
    except (ValueError, TypeError): return {}
    told = docments(target, full=True)  # knows what @delegates brings
    own, stars, found = comments(sym), {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}, {}
    for name, p in sig.parameters.items():
        what = own.get(name) or (told.get(name) or {}).get("docment") or ""
        if name in ("self", "cls") or (p.kind in stars and not what): continue
        found[stars.get(p.kind, "") + name] = kind(p.annotation), "" if p.default is EMPTY else shown(p.default), what
    return found


def kind(annotation) -> str: return "" if annotation is EMPTY else annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def shown(default) -> str: return default.__name__ if hasattr(default, "__name__") else repr(default)


def docstring(sym) -> str:
    own = getattr(sym, "__doc__", None) or getattr(code_of(sym), "__doc__", None)
    return inspect.cleandoc(own) if own and not own.startswith(f"{getattr(sym, '__name__', '')}(") else ""


def cell(text) -> str: return " ".join(str(text).split()).replace("|", r"\|")


def table(sym) -> str:
    "The parameters as a Markdown table; empty where there is none"
    rows = [(f"`{name}`", f"`{cell(t)}`" if t else "", cell(what)) for name, (t, _, what) in parameters(sym).items()]
    gives = None if inspect.isclass(sym) else comments(sym).get("return")
    if gives: rows.append(("returns", "", cell(gives)))
    if not rows: return ""
    if not any(t for _, t, _ in rows): rows = [(name, what) for name, _, what in rows]
    head = ("parameter", "type", "what it is") if len(rows[0]) == 3 else ("parameter", "what it is")
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def call(sym, name: str) -> str:
    "The call with its defaults, on one line or one line for each parameter"
    given = [name + (f"={default}" if default else "") for name, (_, default, _) in parameters(sym).items()]
    short = f"{name}({', '.join(given)})"
    return short if len(short) <= 80 else f"{name}(\n" + "".join(f"    {g},\n" for g in given) + ")"


def body(sym, name: str) -> str:
    "Signature, docstring and table"
    is_call = callable(sym) or hasattr(sym, "__func__")
    return "\n\n".join(part for part in (f"```python\n{call(sym, name) if is_call else name}\n```", docstring(sym), table(sym)) if part)


class ApiEntry(BasicMarkdownRenderer):
    "What nbdev puts under each exported definition (`renderer` in settings.ini)"
    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym, name or getattr(sym, "__qualname__", None), title_level)

    def _repr_markdown_(self):
        head, level = super()._repr_markdown_().split("```python\n")[0], "#" * (self.title_level + 1)
        own = {name: f for name, f in methods(self.sym).items() if inside(f)}  # what is patched in has an entry of its own
        return head + body(self.sym, self.nm) + "".join(f"\n\n{level} {self.nm}.{name}\n\n{body(f, name)}" for name, f in own.items())


def inside(f) -> bool:
    "Whether a method stands in the body of its class: what is patched in stands on its own"
    return "." in inspect.unwrap(code_of(f)).__code__.co_qualname


def fold(cell):
    "Code that notebooks fold is folded on the site too, and so is the source below an entry of the API (`procs` in settings.ini)"
    if cell.cell_type != "code": return
    if "code-fold: show" in cell.source: cell.source = cell.source.replace("code-fold: show", "code-fold: true")
    elif cell.metadata.get("jupyter", {}).get("source_hidden") and "code-fold" not in cell.source:
        cell.source = f"#| code-fold: true\n{cell.source}"


def unlink(cell):
    "Names that have no entry of their own are code, not links that lead nowhere (also one of `procs`)"
    def bare(text): return re.sub(r"\[(`[^`\]]+`)\]\([^)\s]+\.html#(?:[\w.]+\.)?_\w*\)", r"\1", text)
    if cell.cell_type == "markdown": cell.source = bare(cell.source)
    for out in cell.get("outputs", []):
        for kind, text in out.get("data", {}).items():
            if kind == "text/markdown": out["data"][kind] = [bare(line) for line in text]


# The page of all public names

def pages() -> list:
    "(part, page, what it teaches) of each row of the table on the home page; a part's own row has no page"
    rows = [row for c in cells(ROOT/"nbs"/"index.ipynb", "markdown") for row in re.findall(r"^\| (.+?) \|(.*?)\|$", c["source"], flags=re.M)]
    part, found = None, []
    for name, what in rows:
        if name.startswith("**"): part = name.strip("*")
        elif link := re.fullmatch(r"\[(.+)\]\((.+)\)", name): found.append((part, link[1], link[2], what))
    return found


def api() -> str:
    import odesteer as ods
    home = {module: nb.name for nb, module in MODULES.items()}
    lines = ["# API", "", "Every public name: `import odesteer as ods`, then `ods.NAME`. The pages explain them, and document what modules hold beside them.", "",
             "<!-- Made by `python -m tests.site` from the package: edit the notebooks -->"]
    for module in ods._MODULES:
        names = [name for name in ods.__all__ if ods._HOME[name] == module]
        if not names: continue
        lines += ["", f"## {module}", "", f"Explained on [page {home[module].partition('_')[0]}]({home[module]})."]
        for name in names: lines += ["", f"### {name}", "", *entry(getattr(ods, name), name)]
    return "\n".join(lines) + "\n"


def entry(sym, name) -> list:
    "A public name, and the methods that its class adds to those of its bases"
    if not callable(sym): return [constant(name), "", f"Its keys: {', '.join(f'`{key}`' for key in sym)}."]
    parts = [body(sym, name)]
    for method, f in methods(sym).items(): parts += ["", f"#### {name}.{method}", "", body(f, method)]
    return parts


def methods(cls) -> dict:
    "Public methods and properties that a class adds to those of its bases"
    if not inspect.isclass(cls): return {}
    public = {name: f for name, f in vars(cls).items() if name[0] != "_" and (inspect.isfunction(f) and f.__name__ != "<lambda>" or isinstance(f, (property, classmethod, staticmethod)))}
    return {name: f for name, f in public.items() if not any(hasattr(base, name) for base in cls.__mro__[1:])}


def constant(name) -> str:
    "The lines of `#:` comments above a constant, or the comment behind it"
    import odesteer as ods
    source = inspect.getsource(importlib.import_module(f"odesteer.{ods._HOME[name]}"))
    found = re.search(rf"((?:^#: .+\n)+){name}\b|^{name} = .*?  # (.+)$", source, flags=re.M)
    return " ".join(re.sub("^#: ", "", found[1] or found[2], flags=re.M).split()) if found else ""


# The sidebar

def sidebar() -> str:
    "The parts of the home page; what is for teachers is listed as their first page lists it"
    contents, sections = [{"text": "odesteer", "href": "index.ipynb"}], {}
    for part, name, file, _ in pages():
        if part not in sections: contents.append({"section": part, "contents": sections.setdefault(part, [])})
        sections[part].append({"text": name, "href": file})
    teach = sections["Teach"]
    there = {item["href"] for item in teach}
    text = (ROOT/"nbs"/"teach"/"index.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| .*$", text, flags=re.M):
        links = re.findall(r"\[([^]]+)\]\(([^)]+)\)", row)
        kind = row[2:].partition("[")[0].strip() + ": " if len(links) > 2 else ""
        teach += [{"text": kind + name, "href": f"teach/{file}"} for name, file in links if f"teach/{file}" not in there]
    made = {"website": {"sidebar": {"contents": contents}}}
    return "# Made by `python -m tests.site` from the tables of the home page and of teach/index.md\n" + yaml.safe_dump(made, sort_keys=False, allow_unicode=True)


def render() -> dict: return {"nbs/api.md": api(), "nbs/sidebar.yml": sidebar()}


def stale() -> list: return [path for path, text in render().items() if not (ROOT/path).exists() or (ROOT/path).read_text(encoding="utf-8") != text]


if __name__ == "__main__":
    if "--check" in sys.argv: sys.exit(f"stale: {stale()}; run `python -m tests.site`" if stale() else 0)
    for path, text in render().items(): (ROOT/path).write_text(text, encoding="utf-8")
