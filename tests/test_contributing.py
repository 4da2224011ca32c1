"CONTRIBUTING.md as it stands: the method and the task that it adds keep every promise of those that are here"
import inspect
import json
import re

import numpy as np
import pytest

import odesteer as ods
from odesteer import baselines, cli, commands, runs, tasks
from odesteer.data import read_rows

from . import test_steerers
from .archs import tiny_model, tiny_tokenizer
from .project import ROOT
from .test_cli import tiny  # noqa: F401
from .test_steerers import a, data, folder, steerer  # noqa: F401  (the suite below runs on this page's `name`)

TEXT = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(section: str, kind: str = "python") -> list:
    "The code blocks of a section"
    text, = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return [code for of, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if of == kind]


def entry(block: str) -> tuple:
    "Name and value of a line in a table"
    (pair,) = eval("{" + block + "}").items()
    return pair


# ---- a method: its class, its line, and the suite that runs over every name

@pytest.fixture(scope="module", autouse=True)
def median():
    "What the first two steps do, for the time of this module"
    code, method = blocks("Add a method")
    space = dict(vars(baselines))
    exec(code, space)
    name, (module, cls, kind) = entry(method)
    assert module == "baselines"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, cls, space[cls], raising=False)
        patch.setitem(ods._HOME, cls, module)
        patch.setitem(ods.REGISTRY, name, (cls, kind))
        yield name


@pytest.fixture(scope="module", params=[entry(blocks("Add a method")[1])[0]])
def name(request): return request.param


def test_the_method_is_known(name, data):  # noqa: F811
    assert name in ods.steerer_names() and type(ods.make_steerer(name)).__name__ == ods.REGISTRY[name][0]
    s = ods.make_steerer(name, scale=2.).fit(data["pos"], data["neg"])
    shift = data["pos"].median(0).values - data["neg"].median(0).values
    np.testing.assert_allclose(s.steer(data["neg"]) - data["neg"], 2 * shift.expand_as(data["neg"]), rtol=1e-4, atol=1e-4)


for test, check in vars(test_steerers).items():  # every check that is about a method
    if test.startswith("test_") and {"name", "steerer"} & inspect.signature(check).parameters.keys(): globals()[test] = check


# ---- a task: its builder, from a file to a run

@pytest.fixture(scope="module")
def capitals(tmp_path_factory):
    "The builder, entered as the page does, and a file in the form that the text shows"
    row, = blocks("Add a task", "json")
    path = tmp_path_factory.mktemp("rows")/"capitals.jsonl"
    like = [{k: f"{v.rstrip('?')} {i}{'?' * v.endswith('?')}" for k, v in json.loads(row).items()} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, [json.loads(row), *like])))
    code, = blocks("Add a task")
    before = dict(tasks.REAL_TASKS)
    exec(code, dict(vars(tasks)))
    yield str(path)
    tasks.REAL_TASKS.clear()
    tasks.REAL_TASKS.update(before)


def test_the_task_is_known_and_does_not_leak(capitals):
    spec = tasks.REAL_TASKS["capitals"]
    task = spec(capitals)
    fold, = task.folds
    fold.check()
    assert spec.files == ("path",) and task.decoding["max_new_tokens"] == 10 == spec.rules("no such protocol")["decoding"]["max_new_tokens"]
    assert (len(fold.texts.pos), len(fold.val), len(fold.test)) == (9, 3, 13)
    prompt = fold.test[0]
    right = next(r["right"] for r in read_rows(capitals) if r["question"] == prompt.fact)
    scores = task.judge([prompt] * 3, [f" {right}, of course", "Lyon", ""])
    assert scores["right"].tolist() == [1, 0, 0] and scores["empty"].tolist() == [0, 0, 1]
    assert task.data["recipe"] == {"task": "capitals"} and spec(capitals, seed=1).data["recipe"] == {"task": "capitals", "seed": 1}
    assert len({spec(capitals, **kw).data["sha256"] for kw in ({}, {"seed": 1}, {"limit": 2})}) == 3


def test_a_run_of_the_task_is_made_again_from_its_config(capitals, tmp_path):
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    bench = runs.Bench(model, tokenizer, tasks.REAL_TASKS["capitals"](capitals, seed=3), tmp_path/"runs", name="tiny", batch_size=4)
    plain, run = bench.run(split="test"), bench.run("median", 1, {"share": .5}, split="test")
    assert len(run.scores["right"]) == 13 and run.config["data"]["judge"] == "begins with the right city"
    answers = [[json.loads(line)["answer"] for line in open(bench.out/r.key/"answers.jsonl")] for r in (plain, run)]
    assert answers[0] != answers[1]
    again = runs.rerun(run.config, tmp_path/"again", model, tokenizer, path=capitals)
    assert again.key == run.key and again.scores.keys() == run.scores.keys()
    np.testing.assert_array_equal(again.scores["right"], run.scores["right"])


def test_the_command_runs_as_it_is_written(capitals, tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "METHODS", [*commands.METHODS, "median"])
    command, = blocks("Add a task", "")
    words = command.split()
    for option, here in (("--model", str(tiny)), ("--data", capitals)): words[words.index(option) + 1] = here
    assert words[0] == "odesteer" and cli.main([*words[1:], "--limit", "2", "--layers", "1", "--seeds", "1", "--out", "out"]) == 0
    done = [runs.read_run(p.parent) for p in (tmp_path/"out").glob("*/summary.json")]
    assert {r.config["method"] for r in done} == {None, "median"} and {r.config["task"] for r in done} == {"capitals"}


def test_the_text_names_what_there_is():
    for path in re.findall(r"`((?:nbs|tests|odesteer)/[\w./]+)`", TEXT): assert (ROOT/path).exists(), path
    for name in ("SMALL",): assert hasattr(test_steerers, name)
    for name in ("make_fold", "real_task", "register_task", "REAL_TASKS"): assert name in tasks.__all__ and name in TEXT
