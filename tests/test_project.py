"The repository as a project: notebooks and modules agree, notebooks are clean and in order, the package imports and builds"
import ast
import base64
import email
import importlib
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser

import pytest

import odesteer as ods

from . import readme
from .project import MODULES, NOTEBOOKS, PAGES, ROOT, cells, copy_of_sources, directive, run, user_env

HEAVY = "transformers datasets matplotlib ipywidgets sklearn scipy torchdiffeq"
by_page = pytest.mark.parametrize("nb", PAGES, ids=lambda nb: nb.stem)
by_notebook = pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.stem)


# Notebooks are the source

def test_exported_modules_are_fresh(tmp_path):
    copy = copy_of_sources(tmp_path/"odesteer")
    for module in (copy/"odesteer").glob("*.py"): module.name == "__init__.py" or module.unlink()
    run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=copy)
    ours, theirs = ({p.name: p.read_text() for p in (at/"odesteer").glob("*.py")} for at in (ROOT, copy))
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    assert not differ, f"{differ} differ from what the notebooks export; run `nbdev_export`"


@by_notebook
def test_notebook_is_clean(nb):
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import _nbdev_clean
    notebook = read_nb(nb)
    del notebook["path_"]
    for cell in notebook.cells: cell.pop("idx_", None)
    _nbdev_clean(notebook)
    assert nb2str(notebook) == nb.read_text(encoding="utf-8"), f"run `nbdev_clean --fname {nb.relative_to(ROOT)}`"


@by_notebook
def test_cells_have_ids_and_presentable_outputs(nb):
    ids = [cell.get("id") for cell in cells(nb)]
    assert all(ids) and len(set(ids)) == len(ids)
    for cell in cells(nb, "code"):
        for out in cell["outputs"]:
            where = f"{nb.name}, cell {cell['id']}"
            assert out["output_type"] != "error", f"{where} stores an error"
            assert not any("widget" in kind for kind in out.get("data", {})), f"{where} stores a widget"
            shown = "".join(out.get("text", [])) + "".join(out.get("data", {}).get("text/plain", []))
            assert "\r" not in shown and "it/s" not in shown, f"{where} stores a progress bar"
            assert "/tmp/" not in shown and "/home/" not in shown, f"{where} shows a path of the machine it ran on"
            assert out.get("name") != "stderr", f"{where} stores something written to stderr: {shown[:200]}"


@by_notebook
def test_notebook_is_small(nb):
    images = [base64.b64decode("".join(data["image/png"])) for cell in cells(nb, "code") for out in cell["outputs"] if "image/png" in (data := out.get("data", {}))]
    for png in images: assert len(png) < (500_000 if b"acTL" in png else 120_000), "a figure should be about 50 kB, a moving one below 500: plot fewer points, or rasterise"
    assert nb.stat().st_size < 1_100_000


@by_page
def test_page_has_the_common_form(nb):
    page = cells(nb)
    if nb in MODULES:
        first, *page = page
        assert re.fullmatch(r"#\|\s*default_exp\s+\w+", first["source"].strip()), "the first cell names the module and nothing else"
    else: assert "results" in nb.stem and not exported(nb), "only a page of results exports nothing: it begins with its title"
    title, badge, install, *_ = (cell["source"].strip() for cell in page)
    assert re.fullmatch(r"# [^\n]+\n+> [^\n]+", title), "then come the title and a one-line subtitle"
    assert f"blob/main/nbs/{nb.name}" in badge, "then a cell that opens this page in Colab"
    assert directive(install, "hide") and "google.colab" in install, "then one that installs the library on Colab"
    text = "\n".join(cell["source"] for cell in page if cell["cell_type"] == "markdown")
    for part in ("You will learn", "You need", "Running time", "## Recap", "## Exercises"): assert part in text, f"{part!r} is missing"


LONG_CELLS = {"40e516c6": "fit_network: a loop that is read as one, below thirteen documented parameters",
              "c518f22e": "BenchOptions: a table, one option a line"}  # by the id of the cell


def exported(nb) -> dict:
    "Source of each export cell, by its id"
    return {cell["id"]: cell["source"] for cell in cells(nb, "code") if directive(cell["source"], "exports?")}


@by_page
def test_page_can_be_read(nb):
    wide = {i: line for i, source in exported(nb).items() for line in source.split("\n") if len(line) > 120}
    assert not wide, f"exported lines of more than 120 characters: {wide}"
    long = [i for i, source in exported(nb).items() if source.count("\n") > 30 and i not in LONG_CELLS]
    assert not long, f"export cells of more than 30 lines below the directive: {long}"


def test_exceptions_are_needed():
    assert LONG_CELLS.keys() <= {i for nb in PAGES for i, source in exported(nb).items() if source.count("\n") > 30}


@by_notebook
def test_notebook_leaves_no_global_state(nb):
    for cell in cells(nb, "code"):
        found = re.search(r"\b(torch|np\.random|random)\.(manual_)?seed\(|set_default_dtype|set_seed\(|os\.environ\[[^]]+\] *=|\brcParams\[[^]]+\] *=", cell["source"])
        fine = not found or "fork_rng" in cell["source"]  # transformers initialises and samples from the global generator only
        assert fine, f"{found.group()} in cell {cell['id']} changes what runs after it: use a generator, or `with torch.random.fork_rng():`"


# A module uses only modules of lower numbers

def modules_used(source: str) -> set:
    "Modules of odesteer that a cell imports or reaches through the package"
    source = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n"))
    if source.startswith("pass") and "\n" in source: source = source[5:]  # the rest of a cell that starts with a magic
    try: tree = ast.parse(source)
    except SyntaxError: return set()
    used, names = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "odesteer": names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("odesteer."): used.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.level == 1: used.add((node.module or node.names[0].name).split(".")[0])
        elif isinstance(node, ast.Import): used |= {a.name.split(".")[1] for a in node.names if a.name.startswith("odesteer.")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("ods", "odesteer"): names.append(node.attr)
    return used | {ods._HOME.get(name, name) for name in names}


@by_page
def test_page_uses_only_lower_numbers(nb):
    order = {module: page.name for page, module in MODULES.items()}  # names sort by number
    for cell in cells(nb, "code"):
        for module in modules_used(cell["source"]) & order.keys():
            fine = module == "plots" or (order[module] < nb.name and nb.stem != "plots") or module == MODULES.get(nb)
            assert fine, f"cell {cell['id']} of {nb.name} uses {module}, which a reader meets only in {order[module]}"


def test_the_order_rule_sees_every_way_to_import():
    for source in ("import odesteer.euler", "from odesteer.euler import CAA", "from .euler import CAA", "from odesteer import euler", "from odesteer import CAA",
                   "ods.CAA()", "def f():\n    from odesteer.euler import CAA", "%%time\nods.CAA()"):
        assert modules_used(source) == {"euler"}, source


# Lint

def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"], cwd=ROOT, text=True, capture_output=True)
    found = [line for line in done.stdout.splitlines() if re.match(r"[\w/.]+\.py:\d", line)]
    assert done.returncode == bool(found), done.stdout + done.stderr
    assert not found, "\n".join(["run `ruff check`:", *found])


# The README

def test_readme_is_fresh():
    stale = readme.stale(readme.render())
    assert not stale, f"{stale} differ from what nbs/index.ipynb gives; run `python -m tests.readme`"


def test_ci_runs_what_the_readme_says():
    *_, command = (ROOT/".ci"/"run").read_text().strip().splitlines()
    assert command.startswith("python3 -m venv .venv") and command in (ROOT/"README.md").read_text().splitlines()


def test_readme_counts_the_architectures_that_are_tested():
    from .archs import CONFIGS
    assert f"{len(CONFIGS)} architectures are tested" in (ROOT/"README.md").read_text()


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", (ROOT/"README.md").read_text())
    assert not [link for link in links if not (ROOT/link).exists()]


# Importing

def fresh(code: str) -> str:
    "What a fresh interpreter prints"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_importing_the_package_loads_nothing_heavy(report):
    out = fresh(f"import sys, time; t = time.perf_counter(); import odesteer; t = time.perf_counter() - t; "
                f"print(t, *set('torch numpy {HEAVY}'.split()) & sys.modules.keys())")
    seconds, *loaded = out.split()
    assert not loaded
    report(f"{float(seconds):6.2f} s  import odesteer")


def test_importing_the_modules_loads_nothing_heavy(report):
    names = " ".join(MODULES.values())
    out = fresh(f"""
import importlib, sys, time
for name in '{names}'.split():
    t = time.perf_counter(); importlib.import_module('odesteer.' + name)
    print(name, time.perf_counter() - t, *set('{HEAVY}'.split()) & sys.modules.keys())""")
    for name, seconds, *loaded in map(str.split, out.splitlines()):
        assert not loaded, f"importing odesteer.{name} loads {loaded}: import inside the function that needs it"
        report(f"{float(seconds):6.2f} s  import odesteer.{name}, after the lines above")


# The public surface

@pytest.mark.parametrize("name", ods.__all__)
def test_public_name_resolves(name):
    assert getattr(ods, name) is not None
    assert name in dir(ods)
    assert name in importlib.import_module(f"odesteer.{ods._HOME[name]}").__all__


@pytest.mark.parametrize("key", ods.REGISTRY)
def test_registered_method_resolves(key):
    name, kind = ods.REGISTRY[key]
    assert name in ods.__all__ and kind in ("steerer", "controller", "placebo", "made")
    assert isinstance(getattr(ods, name), type)


def test_methods_have_one_table_and_colours_that_differ():
    assert ods.REGISTRY == {name: (cls, kind) for name, (_, cls, kind) in ods._METHODS.items()}
    colors = [color for name, color in importlib.import_module("odesteer.plots").COLORS.items() if name in ods.REGISTRY]
    assert len(set(colors)) == len(colors)


def test_modules_are_attributes_without_importing_them():
    fresh("import odesteer as ods; assert ods.euler.CAA is ods.CAA and ods.plots.style; assert set(dir(ods)) >= {'euler', 'statistics'}")
    assert set(ods._MODULES) == set(MODULES.values()), "every page's module stands in the table of odesteer/__init__.py"


def test_version_is_that_of_the_settings(): assert ods.__version__ == settings()["version"]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'CAAA'"): ods.CAAA
    assert not hasattr(ods, "__wrapped__")


def test_star_import_gives_the_public_names():
    space = {}
    exec("from odesteer import *", space)
    assert set(ods.__all__) <= space.keys()


# Distributions

def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    return ini["DEFAULT"]


def test_wheel_holds_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as z: names = set(z.namelist())
    package = {str(p.relative_to(ROOT)) for p in (ROOT/"odesteer").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {n for n in names if not n.startswith("odesteer-")} == package
    assert any(n.endswith("LICENSE") for n in names)
    assert distributions["wheel"].stat().st_size < 8e6


def test_wheel_declares_what_the_settings_say(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as z:
        read = lambda name: z.read(next(n for n in z.namelist() if n.endswith(f".dist-info/{name}"))).decode()
        meta, entry = email.message_from_string(read("METADATA")), read("entry_points.txt")
    cfg = settings()
    assert meta["Version"] == cfg["version"] and meta["Requires-Python"] == f">={cfg['min_python']}"
    bare = lambda requirement: re.match(r"[\w-]+", requirement).group().lower()
    declared = [r for r in meta.get_all("Requires-Dist") if "extra" not in r]
    assert sorted(map(bare, declared)) == sorted(map(bare, cfg["requirements"].split()))
    assert "odesteer = odesteer:_command" in entry
    assert not re.search(r"\]\((?!https?:|#)", meta.get_payload()), "links in the description of a package index are absolute"


def test_sdist_holds_all_sources(distributions):
    with tarfile.open(distributions["sdist"]) as t: names = {n.partition("/")[2] for n in t.getnames()}
    wanted = {"settings.ini", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "tests/__main__.py", "tests/oldest.txt"}
    assert wanted | {str(nb.relative_to(ROOT)) for nb in NOTEBOOKS} <= names
    assert not [n for n in names if "__pycache__" in n or n.startswith((".", "build", "dist"))]


def test_wheel_alone_imports(site, tmp_path):
    where = run(sys.executable, "-c", "import odesteer; print(odesteer.__file__)", cwd=tmp_path, env=user_env(site))
    assert where.strip() == str(site/"odesteer"/"__init__.py")


def test_every_import_of_the_package_is_declared():
    cfg = settings()
    declared = {re.match(r"[\w-]+", r).group() for r in " ".join(cfg[k] for k in ("requirements", "lm-eval_requirements", "peft_requirements")).split()}
    known = {"scikit-learn": "sklearn", "pillow": "PIL", "ipython": "IPython"}
    allowed = {known.get(d, d) for d in declared} | set(sys.stdlib_module_names) | {"odesteer"}
    for path in (ROOT/"odesteer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names: assert name.split(".")[0] in allowed, f"{path.name} imports {name}, which settings.ini does not declare"


def pins(path) -> dict:
    "Versions that a constraints file names"
    return dict(line.lower().split("==") for line in (ROOT/path).read_text().splitlines() if "==" in line)


def test_constraints_meet_the_declared_ranges():
    from packaging.requirements import Requirement
    known, cfg = pins("constraints.txt"), settings()
    for text in " ".join(v for k, v in cfg.items() if k.endswith("requirements")).split():
        need = Requirement(text)
        assert need.specifier.contains(known[need.name.lower()]), text


def test_the_oldest_versions_tested_are_the_oldest_declared():
    from packaging.requirements import Requirement
    from packaging.version import Version
    needs = [Requirement(text) for text in settings()["requirements"].split()]
    declared = {need.name: Version(s.version) for need in needs for s in need.specifier if s.operator == ">="}
    oldest = {name: Version(v) for name, v in pins("tests/oldest.txt").items()}
    assert oldest.pop("torch") == Version(pins("constraints.txt")["torch"]) and declared.pop("torch")
    assert oldest == declared and len(needs) == len(declared) + 1, "tests/oldest.txt is not what settings.ini declares"
