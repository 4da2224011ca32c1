"Notebooks run each in a process of its own: `python -m tests.notebooks page.ipynb folder` runs one and prints its seconds"
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from .project import ROOT, directive

# what most pages import takes longer than many of them run
PRELOADED = ["execnb.shell", "nbformat", "torch", "matplotlib.pyplot", "scipy.optimize", "sklearn.linear_model",
             "transformers.generation", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"]


def solved(page):
    """The page as a reader works through it: every stub is tried and must not pass, every folded solution is run and must.

    A stub hands its unfinished answer to `attempt`; a solution is Markdown that folds, with the code in it."""
    import nbformat
    out = []
    for cell in page.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^attempt\(", "assert not attempt(", cell.source, flags=re.M)
        out.append(cell)
        if cell.cell_type != "markdown" or "<summary>Solution" not in cell.source: continue
        for code in re.findall(r"^```python\n(.*?)^```", cell.source, flags=re.M | re.S):
            out.append(nbformat.v4.new_code_cell(re.sub(r"^attempt\(", "assert attempt(", code, flags=re.M)))
    page.cells = out
    return page


def execute(nb: Path, folder: Path) -> float:
    "Seconds that the notebook takes, its exercises tried and solved; an error in a cell ends the process"
    import nbformat
    from execnb.shell import CaptureShell
    os.chdir(folder)
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT]  # odesteer comes from where the environment says
    shell, start = CaptureShell(folder), time.perf_counter()
    for cell in solved(nbformat.read(nb, 4)).cells:
        if cell.cell_type != "code" or directive(cell.source, "eval: *false"): continue
        shell.run(cell.source)
        if shell.exc: sys.exit("\n".join([cell.source, *traceback.format_exception(shell.exc)]))
    return time.perf_counter() - start


def serve():
    """Run the notebooks named on the input, each a line [notebook, folder] in JSON, and say how each ended.

    On Linux each is a fork of this process, in which what nearly all of them import is there already. `odesteer` is not.
    Elsewhere a fork of a process that has loaded so much is not safe, and each starts anew."""
    forks = sys.platform == "linux"
    for name in PRELOADED if forks else (): importlib.import_module(name)
    for line in sys.stdin:
        nb, folder = map(Path, json.loads(line))
        with open(folder.with_suffix(".txt"), "w+") as said:
            if forks:
                child = os.fork()
                if child == 0: _in_child(nb, folder, said)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            else: code = subprocess.run([sys.executable, "-m", "tests.notebooks", nb, folder], stdout=said, stderr=said).returncode
            said.seek(0)
            print(json.dumps([code, said.read()]), flush=True)


def _in_child(nb, folder, said):
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in 1, 2: os.dup2(said.fileno(), stream)
        print(f"{execute(nb, folder):.1f}")
        code = 0
    except SystemExit as e: print(e.code)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Runner:
    "Runs notebooks one after the other, each in an empty folder"
    def __init__(self,
        folder: Path,  # the empty folders are made in here
        env: dict,  # in which the wheel is what a user has
    ):
        self.folder = folder
        self.server = subprocess.Popen([sys.executable, "-m", "tests.notebooks"], cwd=ROOT, env=env, text=True, start_new_session=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, nb: Path) -> subprocess.CompletedProcess:
        "What running it has printed, the seconds last"
        where = self.folder/nb.stem
        where.mkdir()
        self.server.stdin.write(json.dumps([str(nb), str(where)]) + "\n")
        self.server.stdin.flush()
        code, said = json.loads(self.server.stdout.readline() or '[1, "the process that runs notebooks has ended"]')
        return subprocess.CompletedProcess(nb, code, said)

    def close(self):
        "End what still runs, where the tests ended early"
        os.killpg(self.server.pid, signal.SIGTERM)
        self.server.wait()


if __name__ == "__main__":
    if len(sys.argv) == 1: serve()
    else: print(f"{execute(*map(Path, sys.argv[1:])):.1f}")
