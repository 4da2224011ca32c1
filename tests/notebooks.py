"Notebooks run beside the other tests, each in a process of its own: `python -m tests.notebooks page.ipynb folder` runs one and prints its seconds"
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .project import ROOT, directive


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
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kwargs):
            if directive(cell.source, "eval: *false"): return cell
            return await super().async_execute_cell(cell, *args, **kwargs)

    client = Client(solved(nbformat.read(nb, 4)), timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    start = time.perf_counter()
    try: client.execute()
    except CellExecutionError as e: sys.exit(re.sub(r"\x1b\[[\d;]*m", "", str(e)))
    return time.perf_counter() - start


class Pool:
    "Runs notebooks on all cores but one, and on that one too as soon as somebody waits for a result"
    def __init__(self,
        notebooks: list,  # paths, in the order in which they start
        folder: Path,  # each runs in an empty folder in here
        env: dict,  # in which the wheel is what a user has
    ):
        cores = os.cpu_count()
        self.folder, self.env, self.running = folder, env, set()
        self.slots = threading.Semaphore(max(1, cores - 1))
        self.waiting = cores == 1
        self.threads = ThreadPoolExecutor(max(1, min(cores, len(notebooks))))
        self.runs = {nb: self.threads.submit(self._run, nb) for nb in notebooks}

    def _run(self, nb: Path) -> subprocess.CompletedProcess:
        where = self.folder/nb.stem
        where.mkdir()
        with self.slots:
            process = subprocess.Popen([sys.executable, "-m", "tests.notebooks", nb, where], cwd=ROOT, env=self.env, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.running.add(process)
            said, _ = process.communicate()
            self.running.discard(process)
        return subprocess.CompletedProcess(process.args, process.returncode, said)

    def result(self, nb: Path) -> subprocess.CompletedProcess:
        "What running it has printed, the seconds last"
        if not self.waiting: self.slots.release()
        self.waiting = True
        return self.runs[nb].result()

    def close(self):
        "End what still runs, where the tests ended early"
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self.running): process.terminate()
        self.threads.shutdown()


if __name__ == "__main__": print(f"{execute(*map(Path, sys.argv[1:])):.1f}")
