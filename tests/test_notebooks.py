"Every notebook runs from top to bottom in an empty folder, with only the wheel and without network"
import os
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbclient import NotebookClient

from .project import NOTEBOOKS, directive, user_env


class Client(NotebookClient):
    "Runs a notebook, except the stubs of its exercises"
    async def async_execute_cell(self, cell, *args, **kwargs):
        if directive(cell.source, "eval: *false"): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def execute(nb, folder, env) -> float:
    "Seconds that the notebook takes; an error in a cell is raised"
    folder.mkdir()
    client = Client(nbformat.read(nb, 4), timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    start = time.perf_counter()
    client.execute(env=env)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def runs(request, site, tmp_path_factory):
    "The chosen notebooks, running one per core"
    folder, env = tmp_path_factory.mktemp("notebooks"), user_env(site)
    chosen = [item.callspec.params["nb"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {nb: pool.submit(execute, nb, folder/nb.stem, env) for nb in chosen}


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.stem)
def test_notebook_runs(nb, runs, report):
    report(f"{runs[nb].result():6.1f} s  {nb.name}")
