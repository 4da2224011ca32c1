"Notebooks run beside the other tests, each in a process of its own: `python -m tests.notebooks page.ipynb folder` runs one and prints its seconds"
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
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


class Pool:
    "Runs notebooks on all cores but one, and on that one too as soon as somebody waits for a result"
    def __init__(self,
        notebooks: list,  # paths, in the order in which they start
        folder: Path,  # each runs in an empty folder in here
        env: dict,  # in which the wheel is what a user has
    ):
        cores = os.cpu_count()
        self.folder, self.env, self.running, self.idle = folder, env, set(), []
        self.slots = threading.Semaphore(max(1, cores - 1))
        self.waiting = cores == 1
        self.threads = ThreadPoolExecutor(max(1, min(cores, len(notebooks))))
        self.runs = {nb: self.threads.submit(self._run, nb) for nb in notebooks}

    def _run(self, nb: Path) -> subprocess.CompletedProcess:
        where = self.folder/nb.stem
        where.mkdir()
        with self.slots:
            server = self.idle.pop() if self.idle else self._server()
            server.stdin.write(json.dumps([str(nb), str(where)]) + "\n")
            server.stdin.flush()
            code, said = json.loads(server.stdout.readline() or '[1, "the process that runs notebooks has ended"]')
            self.idle.append(server)
        return subprocess.CompletedProcess(nb, code, said)

    def _server(self) -> subprocess.Popen:
        server = subprocess.Popen([sys.executable, "-m", "tests.notebooks"], cwd=ROOT, env=self.env, text=True, start_new_session=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.running.add(server)
        return server

    def result(self, nb: Path) -> subprocess.CompletedProcess:
        "What running it has printed, the seconds last"
        if not self.waiting: self.slots.release()
        self.waiting = True
        return self.runs[nb].result()

    def close(self):
        "End what still runs, where the tests ended early"
        self.threads.shutdown(wait=False, cancel_futures=True)
        for server in list(self.running):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
        self.threads.shutdown()


if __name__ == "__main__":
    if len(sys.argv) == 1: serve()
    else: print(f"{execute(*map(Path, sys.argv[1:])):.1f}")
