"Every notebook runs from top to bottom in an empty folder, with only the wheel and without network"
import pytest

from .project import NOTEBOOKS


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.stem)
def test_notebook_runs(nb, notebooks, report):
    done = notebooks.result(nb)
    if done.returncode: pytest.fail(f"{nb.name} does not run:\n{done.stdout}", pytrace=False)
    report(f"{float(done.stdout.split()[-1]):6.1f} s  {nb.name}")
