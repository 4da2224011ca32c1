"""README.md is index.ipynb, rendered without Quarto: `python -m tests.readme` writes it, `--check` says whether it is fresh"""
import base64
import re
import sys

from execnb.nbio import read_nb
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, rm_export, strip_ansi

from .project import ROOT

INDEX = ROOT/"nbs"/"index.ipynb"
IMAGES = "nbs/images"  # the README's figures, beside the notebooks so that the site has them too


def text(lines) -> str: return lines if isinstance(lines, str) else "".join(lines)


def indented(lines) -> str: return "\n".join(f"    {line}".rstrip() for line in text(lines).rstrip("\n").split("\n"))


def output_md(out, name, files, alt) -> str:
    "One output of a cell as Markdown; an image goes into `files`"
    data = out.get("data", {})
    if "image/png" in data:
        path = f"{IMAGES}/{name}.png"
        files[path] = base64.b64decode(text(data["image/png"]))
        return f"![{alt}]({path})"
    if "text/markdown" in data: return text(data["text/markdown"]).rstrip()
    return indented(data["text/plain"] if data else out["text"])


def cell_md(cell, files) -> str:
    "One cell as Markdown, as Quarto would show it"
    if cell.cell_type == "markdown":
        return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", r"](nbs/\1)", cell.source)  # links are written for a reader inside nbs/
    options = dict(re.findall(r"^#\|\s*(\w+):\s*(\w+)\s*$", cell.source, re.MULTILINE))
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
    parts = [] if options.get("echo") == "false" or not source else [f"```python\n{source}\n```"]
    if options.get("output") != "false":
        alt = "".join(re.findall(r"^#\| fig-alt: (.+)$", cell.source, flags=re.MULTILINE))
        parts += [output_md(out, f"index-{cell.id}-{i}", files, alt) for i, out in enumerate(cell.outputs)]
    return "\n\n".join(parts)


def render() -> dict:
    "Path -> content of README.md and of its figures"
    nb = read_nb(INDEX)
    NBProcessor(nb=nb, procs=[strip_ansi, hide_line, filter_stream_, rm_export, hide_]).process()
    files = {}
    parts = [cell_md(cell, files) for cell in nb.cells if cell.cell_type in ("markdown", "code")]
    note = "<!-- Made from nbs/index.ipynb by `python -m tests.readme`: edit that -->"
    return files | {"README.md": ("\n\n".join([note, *(p for p in parts if p)]) + "\n").encode()}


def stale(files: dict) -> list:
    "Paths that differ from what index.ipynb gives, among them figures that nothing shows any more"
    old = {f"{IMAGES}/{p.name}" for p in (ROOT/IMAGES).glob("index-*")} - files.keys()
    return sorted(old | {path for path, data in files.items() if not (ROOT/path).exists() or (ROOT/path).read_bytes() != data})


if __name__ == "__main__":
    files = render()
    paths = stale(files)
    if "--check" in sys.argv:
        if paths: sys.exit(f"not what nbs/index.ipynb gives: {', '.join(paths)}; run `python -m tests.readme`")
    else:
        for path in paths:
            (ROOT/path).parent.mkdir(exist_ok=True)
            (ROOT/path).write_bytes(files[path]) if path in files else (ROOT/path).unlink()
    print("README.md is fresh" if not paths else f"wrote {', '.join(paths)}")
