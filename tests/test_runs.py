"Runs that survive anything: keys, what stands in a folder, kills, strengths that meet, flat memory"
import copy
import json
import math
import re
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.data import Prompt
from odesteer.runs import Bench, Paused, best_batch, canonical_params, read_run, rerun, run_key, strength_at, write_batches
from odesteer.sweeps import MICRO_PARAMS, micro_bench
from odesteer.tasks import Fold, Task

from .benches import bench, contents, small


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


# ---- tasks and keys

def test_a_task_that_leaks_cannot_exist(lm):
    task = small(lm)
    fold, = task.folds
    make = lambda *parts: Task("t", [Fold(*parts)], task.judge, task.primary, task.better, data={})
    make(fold.texts, fold.val, fold.test)
    shout = [Prompt(p.text, "WHAT is  it?") for p in fold.val[:1]]
    for parts in ((fold.texts, fold.val, fold.val), (fold.texts, [Prompt("x", fold.texts.pos_groups[0])], fold.test), (fold.texts, shout, [Prompt("y", "what is it")])):
        with pytest.raises(ValueError, match="questions stand both in the"): make(*parts)
    with pytest.raises(ValueError, match="was not checked|were not checked"): Bench(lm.model, lm.tokenizer, small(lm, data=None), "unused")
    with pytest.raises(ValueError, match="better="): Task("t", [fold], task.judge, "beauty", task.better, data={})


def test_every_setting_that_matters_changes_the_key(lm, tmp_path):
    base = dict(method="caa", layer=1, strength={"share": .3}, params={}, split="val", seed=0)
    keys = [run_key(bench(lm, tmp_path).config(**base))]
    for change in (dict(method="iti"), dict(layer=2), dict(strength={"share": .31}), dict(strength={"T": .3}), dict(params={"C": 2.}), dict(split="test"), dict(seed=1), dict(method=None), dict(method=None, arm="prompt")):
        keys.append(run_key(bench(lm, tmp_path).config(**{**base, **change})))
    for other in (bench(lm, tmp_path, n=5), bench(lm, tmp_path, batch_size=3), bench(lm, tmp_path, decoding={"max_new_tokens": 9}), bench(lm, tmp_path, axis="toxicity"), bench(lm, tmp_path, samples=2), bench(lm, tmp_path, stop=(".",))): keys.append(run_key(other.config(**base)))
    with torch.no_grad():
        weight = lm.model.model.layers[0].mlp.up_proj.weight
        before = weight[0, 0].item()
        weight[0, 0] += 1
        keys.append(run_key(bench(lm, tmp_path).config(**base)))
        weight[0, 0] = before
    assert len(set(keys)) == len(keys)
    assert run_key(bench(lm, tmp_path/"elsewhere").config(**base)) == keys[0]


def test_hyper_parameters_in_one_form():
    assert canonical_params("odesteer", {"steps": 10, "gamma": .5, "seed": 0}) == {"gamma": .5}
    assert canonical_params("caa", {"seed": 3}) == {} and canonical_params("random", {"seed": 3}) == {"seed": 3}
    for method in "odesteer", "step-odesteer":  # parameters that came later leave old runs their keys
        assert canonical_params(method, {"coordinates": "raw", "calibrate": False}) == {}
        assert canonical_params(method, {"coordinates": "centred", "calibrate": True}) == {"calibrate": True, "coordinates": "centred"}
    with pytest.raises(TypeError, match="caa has no hyper-parameter steps; it has none"): canonical_params("caa", {"steps": 3})


# ---- keys that stay

def test_keys_of_old_do_not_change(lm, tmp_path):
    "The engine may grow, but must find again what was run before"
    b = micro_bench("speakers", 0, "truth", tmp_path)
    sketch = MICRO_PARAMS["speakers"]["odesteer"]
    keys = {("caa", 1, (("share", .4),), "val", 0): "46666bcd89526261", ("odesteer", 1, (("share", .4),), "val", 0): "d59e637b31a0119f", ("step-odesteer", 1, (("angle", 10),), "test", 0): "0e043043e9443d32", (None, None, None, "test", 2): "cade43d1ef19290d"}
    for (method, layer, strength, split, seed), key in keys.items():
        assert run_key(b.config(method, layer, strength and dict(strength), sketch if method in MICRO_PARAMS["speakers"] else {}, split, seed)) == key


# ---- runs

def test_a_run_holds_what_was_asked_and_answered(lm, tmp_path):
    b = bench(lm, tmp_path)
    run = b.run("caa", 1, {"share": .3}, split="test", seed=2)
    items = [json.loads(line) for line in open(tmp_path/run.key/"answers.jsonl")]
    assert [i["prompt"] for i in items] == [p.text for p in b.task.folds[0].test] and [i["i"] for i in items] == [*range(6)]
    with ods.steering(lm.model, b.steerer("caa", 1, {}), share=.3):
        by_hand = [a for s in (0, 4) for a in ods.generate_text(lm.model, lm.tokenizer, [i["prompt"] for i in items[s:s + 4]], seed=2_000_006 + s, **b.task.decoding)]
    assert [i["answer"] for i in items] == by_hand
    judged = b.task.judge(b.task.folds[0].test, by_hand)
    np.testing.assert_allclose(run.scores["true_info"], judged["true_info"])
    assert run.summary["means"]["info"] == pytest.approx(np.mean(judged["info"])) and run.summary["n"] == 6 and run.summary["groups"] == len({i["group"] for i in items})
    assert np.nanmean(run.scores["kl"]) > 0 and 0 < run.summary["angle"] < 90 and run.summary["tokens_per_second"] > 0
    assert {p.name for p in (tmp_path/run.key).iterdir()} == {"config.json", "environment.json", "answers.jsonl", "scores.json", "summary.json"}
    assert not lm.model.model.layers[1]._forward_hooks


def test_prompt_arm_choices_stops_and_several_answers(lm, tmp_path):
    prompts = {p.text for p in bench(lm, tmp_path).task.folds[0].val}
    asked = bench(lm, tmp_path).run(arm="prompt")
    assert all(json.loads(line)["prompt"] not in prompts for line in open(tmp_path/asked.key/"answers.jsonl"))
    values = lambda p: [f" the {p.fact.entity} is {p.fact.truth}.", f" the {p.fact.entity} is {p.fact.myth}."]
    b = bench(lm, tmp_path, choices=values, judge=lambda prompts, answers: {"true_info": [float(p.fact.truth in a) for p, a in zip(prompts, answers)]})
    chosen = b.run(split="test")
    logp = [ods.score_continuations(lm.model, lm.tokenizer, [p.text]*2, values(p)) for p in b.task.folds[0].test]
    assert min(abs(x[0] - x[1]) for x in logp) > 1e-4, "no rounding decides"
    np.testing.assert_array_equal(chosen.scores["true_info"], [float(x[0] > x[1]) for x in logp])
    tokens = [[len(lm.tokenizer(c, add_special_tokens=False)["input_ids"]) for c in values(p)] for p in b.task.folds[0].test]
    np.testing.assert_allclose(chosen.scores["logprob"], [x.max() / n[x.argmax()] for x, n in zip(logp, tokens)], rtol=1e-4)  # of the answer that it chose, a token
    seen = []
    b = bench(lm, tmp_path, samples=3, stop=(" is",), judge=lambda prompts, answers: seen.append(len(prompts)) or {"true_info": [float(" is" in a) for a in answers]})
    run = b.run()
    assert b.batch_size == 3 and seen == [3]*6 and len(run.groups) == 18 and run.scores["true_info"].sum() == 0


# ---- how many at once

def test_a_batch_is_doubled_until_that_no_longer_pays():
    seconds = {8: 1., 16: 1.1, 32: 1.5, 64: 2.8, 128: 5.}.get
    assert [*best_batch(seconds, 500)] == [8, 16, 32] and [*best_batch(seconds, 9)] == [8, 16] and [*best_batch(seconds, 8)] == [8]
    assert best_batch(seconds, 64, gain=1.05)[64] == 64 / 2.8
    def small_memory(n):
        if n > 32: raise RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory")
        return 1.
    assert [*best_batch(small_memory, 500)] == [8, 16], "what held a few tokens of 32 answers may not hold them whole"
    def broken(n): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"): best_batch(broken, 64)
    asked = []
    def disturbed(n):  # once, for a moment
        asked.append(n)
        return seconds(n) * (3 if asked == [8, 16] else 1)
    assert best_batch(disturbed, 500) == best_batch(seconds, 500) and asked == [8, 16, 16, 32, 64, 64]

def test_a_measured_batch_size_is_that_of_the_folder_from_then_on(lm, tmp_path, monkeypatch):
    times = iter([dict.fromkeys((8, 16, 32), 1.)] + [{8: 1., 16: 2., 32: 9.}]*9)
    def make(out, **kw):
        now = next(times)
        monkeypatch.setattr(Bench, "_trial", lambda self, n: now[n])
        return bench(lm, tmp_path/out, batch_size="auto", n=20, **kw)
    first, again, elsewhere = make("a"), make("a"), make("b")
    assert [b.batch_size for b in (first, again, elsewhere)] == [32, 32, 8] and first.config() == again.config() and first.config()["batch_size"] == 32
    assert make("a", decoding={"max_new_tokens": 9}).batch_size == 8, "longer answers are measured for themselves"
    run = first.run()
    assert run.key == bench(lm, tmp_path/"a", batch_size=32, n=20).run().key, "the key has the number, not the word"

def test_the_trial_answers_as_many_prompts_as_it_says(lm, tmp_path, monkeypatch):
    b, sizes, generate = bench(lm, tmp_path), [], ods.generate_text
    monkeypatch.setattr(ods, "generate_text", lambda m, t, prompts, size, **kw: sizes.append((len(prompts), size, kw["max_new_tokens"])) or generate(m, t, prompts, size, **kw))
    assert b._trial(9) > 0 and sizes == [(9, 9, 8)]
    b.task = replace(b.task, choices=lambda p: [" a", " b"])
    assert b._trial(9) > 0 and len(sizes) == 1

# ---- several strengths in one batch

GREEDY = dict(max_new_tokens=8, do_sample=False, temperature=None, top_p=None, top_k=None)

def swept(b, monkeypatch, method, layer, strengths, together):
    "Answers of the runs at each strength, and how many prompts every pass had"
    sizes, generate = [], ods.generate_text
    monkeypatch.setattr(ods, "generate_text", lambda m, t, prompts, **kw: sizes.append(len(prompts)) or generate(m, t, prompts, **kw))
    runs = [b.run(method, layer, s, beside=strengths if together else ()) for s in strengths]
    monkeypatch.setattr(ods, "generate_text", generate)
    rows = [[json.loads(line) for line in open(b.out/run.key/"answers.jsonl")] for run in runs]
    return [[(r["i"], r["group"], r["prompt"], r["answer"], r["tokens"]) for r in rs] for rs in rows], [r.key for r in runs], sizes

@pytest.mark.parametrize("method, layer, unit, values", [("caa", 1, "share", (.1, .3, .6)), ("odesteer", 1, "spread", (.5, 1., 3.)), ("odesteer", 2, "nats", (.1, .2, .4)), ("linact", 1, "T", (.3, .6, 1.)), ("caa", 1, "angle", (5, 15, 30)), ("alqr", None, "T", (0., 1., 3.))])
def test_a_batch_that_holds_several_strengths_says_what_each_says_alone(lm, tmp_path, monkeypatch, method, layer, unit, values):
    strengths = [{unit: v} for v in values]
    make = lambda out: bench(lm, tmp_path/out, decoding=GREEDY, batch_size=12)
    alone, keys, one_by_one = swept(make("alone"), monkeypatch, method, layer, strengths, False)
    answers, same_keys, in_one = swept(make("together"), monkeypatch, method, layer, strengths, True)
    assert answers == alone and same_keys == keys and alone[0] != alone[2]
    assert one_by_one == [6, 6, 6] and in_one == [12, 6]

def test_batches_are_shared_only_where_that_changes_nothing(lm, tmp_path, monkeypatch):
    strengths = [{"share": s} for s in (.1, .3)]
    sizes = lambda b: swept(b, monkeypatch, "caa", 1, strengths, True)[2]
    assert sizes(bench(lm, tmp_path/"a", batch_size=12)) == [6, 6], "what is drawn depends on the whole batch"
    assert sizes(bench(lm, tmp_path/"b", decoding=GREEDY, batch_size=11)) == [6, 6], "no room"
    b = bench(lm, tmp_path/"c", decoding=GREEDY, batch_size=12)
    done = b.run("caa", 1, strengths[1])
    assert sizes(b) == [6] and b.run("caa", 1, strengths[1]).summary == done.summary, "what is done is not done again"
    config = b.config("caa", 1, strengths[0])
    assert b._batched_with(config, [{"T": 1.}, {"level": .5, "spread": 1.}, strengths[0], {"share": .9}]) == [config | {"strength": {"share": .9}}]
    half = bench(replace(lm, model=copy.deepcopy(lm.model).bfloat16()), tmp_path/"d", decoding=GREEDY, batch_size=12)
    assert half._batched_with(half.config("caa", 1, strengths[0]), strengths) == [], "in 16 bits rounding depends on the batch"


def test_a_judge_may_leave_items_undefined(lm, tmp_path):
    b = bench(lm, tmp_path, judge=lambda prompts, answers: {"true_info": [np.nan] + [1.]*(len(prompts) - 1)})
    run = b.run()
    assert np.isnan(run.scores["true_info"]).sum() == 2 and run.summary["means"]["true_info"] == 1. and "NaN" not in (tmp_path/run.key/"scores.json").read_text()


DAMAGE = {"empty": lambda text: "", "cut": lambda text: text[:len(text) // 2], "zeros": lambda text: "\x00" * 64, "another kind": lambda text: "[3]\n", "deep": lambda text: "[" * 100_000}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "answers.jsonl", "scores.json", "summary.json"])
def test_a_damaged_file_of_a_run_is_set_aside_and_the_run_made_again(lm, tmp_path, name, damage, capsys):
    run = bench(lm, tmp_path).run("caa", 1, {"share": .3})
    file = tmp_path/run.key/name
    text = file.read_text()
    file.write_text(broken := DAMAGE[damage](text))
    with pytest.raises(ValueError, match=re.escape(str(file))): read_run(tmp_path/run.key)
    again = bench(lm, tmp_path).run("caa", 1, {"share": .3})
    assert again.config == run.config and again.groups == run.groups and all(np.array_equal(again.scores[m], run.scores[m], equal_nan=True) for m in run.scores)
    said = capsys.readouterr().err
    assert f"{file} is damaged; it is kept as {name}.damaged, and made again" in said and said.count("damaged;") == 1
    assert file.with_name(f"{name}.damaged").read_text() == broken and (name == "summary.json" or without_seconds(file) == without_seconds(text))
    assert bench(lm, tmp_path).run("caa", 1, {"share": .3}).summary == again.summary and not capsys.readouterr().err  # whole now
    assert not list(tmp_path.rglob("*lock")) and not list(tmp_path.rglob("*.part"))


def without_seconds(text):
    "What a file of a run says, without the times that it took"
    text = text if isinstance(text, str) else text.read_text()
    return re.sub(r'"seconds": [\d.e-]+', "", text)


@pytest.mark.parametrize("name", ["answers.jsonl", "scores.json"])
def test_a_finished_run_with_too_few_answers_is_no_run(lm, tmp_path, name, capsys):
    run = bench(lm, tmp_path).run()
    file = tmp_path/run.key/name
    if name == "answers.jsonl": file.write_text("".join(file.read_text().splitlines(True)[:-1]))
    else: file.write_text(json.dumps({m: list(x[:-1]) for m, x in run.scores.items()}))
    with pytest.raises(ValueError, match=name): read_run(tmp_path/run.key)
    assert len(bench(lm, tmp_path).run().groups) == len(run.groups)
    if name == "answers.jsonl":  # and where all files agree on too few
        rows, summary = file.read_text().splitlines(True)[:-1], json.loads((tmp_path/run.key/"summary.json").read_text())
        file.write_text("".join(rows))
        (tmp_path/run.key/"scores.json").write_text(json.dumps({m: list(x[:-1]) for m, x in run.scores.items()}))
        (tmp_path/run.key/"summary.json").write_text(json.dumps(summary | {"n": len(rows)}))
        assert len(read_run(tmp_path/run.key).groups) == len(rows)
        assert len(bench(lm, tmp_path).run().groups) == len(run.groups) and "answers.jsonl is damaged" in capsys.readouterr().err


def test_a_lost_file_of_a_run_is_made_again(lm, tmp_path):
    run = bench(lm, tmp_path).run()
    for name in "config.json", "environment.json", "answers.jsonl", "scores.json", "summary.json":
        (tmp_path/run.key/name).unlink()
        again = bench(lm, tmp_path).run()
        assert all(np.array_equal(again.scores[m], run.scores[m], equal_nan=True) for m in run.scores)
        assert name == "environment.json" or (tmp_path/run.key/name).exists()


def test_lines_that_a_power_cut_left_in_a_half_file_are_made_again(tmp_path):
    out, made = tmp_path/"x.jsonl", []
    def batch(i): made.append(i); return [{"i": i}]
    def stop(i):
        if i == 3: raise KeyboardInterrupt
        return batch(i)
    for tail in (b"\x00" * 40 + b"\n", b'{"i": 3}\n', b'[{"i": 3}\n', b"[" * 100_000 + b"\n"):
        with pytest.raises(KeyboardInterrupt): write_batches(out, stop, range(5), {})
        with open(f"{out}.part", "ab") as f: f.write(tail)
        write_batches(out, batch, range(5), {})
        assert [json.loads(line)["i"] for line in out.read_text().splitlines()] == [*range(5)]


@pytest.mark.parametrize("harm", [lambda f: (f/"steerer.safetensors").write_bytes(b"x"), lambda f: (f/"card.json").write_text(""), lambda f: (f/"steerer.safetensors").unlink(),
                                  lambda f: (f/"card.json").write_text((f/"card.json").read_text().replace('"layer": 1', '"layer": 2'))])
def test_a_damaged_steerer_is_set_aside_and_fitted_again(lm, tmp_path, harm, capsys):
    fitted = bench(lm, tmp_path).steerer("caa", 1, {})
    folder, = tmp_path.glob("steerers/*")
    harm(folder)
    again = bench(lm, tmp_path).steerer("caa", 1, {})
    assert torch.equal(again.mean_pos_, fitted.mean_pos_) and ods.load_steerer(folder).card == again.card
    assert f"{folder} is damaged" in capsys.readouterr().err and folder.with_name(f"{folder.name}.damaged").is_dir()


def test_small_files_that_are_damaged_are_made_again(lm, tmp_path, capsys):
    b = bench(lm, tmp_path, n=8)
    at = b.at_effort("caa", 1, .06)
    file, = tmp_path.glob("efforts/*.json")
    for text in "", '{"sha', "[]", "{}", '{"share": null}':
        file.write_text(text)
        assert bench(lm, tmp_path, n=8).at_effort("caa", 1, .06) == at and f"{file} is damaged" in capsys.readouterr().err
    assert bench(lm, tmp_path, n=8).at_effort("caa", 1, .06) == at and not capsys.readouterr().err


def test_a_kept_steerer_of_an_older_version_is_fitted_again(lm, tmp_path):
    fitted = bench(lm, tmp_path).steerer("caa", 1, {})
    old = copy.deepcopy(fitted)
    old.register_buffer("spread_", None)  # as it was saved before there were spreads
    folder, = tmp_path.glob("steerers/*")
    old.save_pretrained(folder)
    assert "spread" not in ods.load_steerer(folder).strength_units
    again = bench(lm, tmp_path).steerer("caa", 1, {})
    assert torch.equal(again.spread_, fitted.spread_) and torch.equal(ods.load_steerer(folder).spread_, fitted.spread_)


def test_what_was_judged_is_not_judged_again(lm, tmp_path, monkeypatch):
    seen, b = [], bench(lm, tmp_path)
    judge = b.task.judge
    b.task.judge = lambda prompts, answers: seen.append(len(prompts)) or judge(prompts, answers)
    monkeypatch.setattr(b, "displacement", lambda *_: 1/0, raising=False)
    with pytest.raises(ZeroDivisionError): b.run("caa", 1, {"share": .3})
    monkeypatch.undo()
    b.run("caa", 1, {"share": .3})
    assert seen == [4, 2]


def test_a_bench_stays_as_it_was_made(lm, tmp_path):
    "What a run is does not depend on what was done before it"
    seen, b = [], bench(lm, tmp_path, on_run=lambda run: seen.append(run.key))
    before, key = dict(vars(b)), run_key(b.config())
    run = b.run("caa", 1, {"share": .3})
    b.read_layers([1, 2])
    b.displacement("caa", 2, {"share": .3})
    after = vars(b)
    assert {k: v for k, v in after.items() if k not in ("_acts", "_steerers")} == {k: v for k, v in before.items() if k not in ("_acts", "_steerers")}
    assert run_key(b.config()) == key and seen[0] == run.key and len(seen) == 1


def test_making_a_run_again_leaves_the_task_alone(lm, tmp_path):
    task = small(lm)
    config = Bench(lm.model, lm.tokenizer, small(lm, decoding=task.decoding | {"max_new_tokens": 5}), tmp_path, "micro").config()
    run = rerun(config, tmp_path, lm.model, lm.tokenizer, task)
    assert run.config["decoding"]["max_new_tokens"] == 5 and task.decoding["max_new_tokens"] == 8


# ---- killed

@pytest.mark.parametrize("cut", [0, 1, 10, -1, -5, None])
def test_batches_cut_anywhere_are_made_again(tmp_path, cut):
    out, made = tmp_path/"x.jsonl", []
    def batch(i): made.append(i); return [{"i": i, "text": "ä\u2028\n"}]
    def stop(i):
        if i == 3: raise KeyboardInterrupt
        return batch(i)
    with pytest.raises(KeyboardInterrupt): write_batches(out, stop, range(5), {"a": 1})
    part = Path(f"{out}.part")
    blob = part.read_bytes()
    part.write_bytes(blob[:cut] if cut is not None else blob.replace(b'"key": "', b'"key": "f'))
    write_batches(out, batch, range(5), {"a": 1})
    assert [json.loads(line) for line in out.read_text().split("\n")[:-1]] == [{"i": i, "text": "ä\u2028\n"} for i in range(5)]
    assert made[:3] == [0, 1, 2] and sorted(set(made)) == [*range(5)] and not part.exists()
    if cut == -1: assert made == [0, 1, 2, 2, 3, 4]


def test_time_that_is_used_up_pauses_between_runs(lm, tmp_path):
    b = bench(lm, tmp_path, deadline=0)
    with pytest.raises(Paused): b.run()
    with pytest.raises(Paused): b.read_layers([1])
    assert not contents(tmp_path) and not (tmp_path/"activations").exists()


# ---- two at once

def in_turns(out, work, n, pace=.01, batches=range(6)):
    "The same work n times at once, begun one after the other; what each raised"
    def batch(i):
        time.sleep(pace)
        return [{"row": i}]
    def go(i):
        time.sleep(i * pace)
        try: write_batches(out, batch, batches, work(i))
        except ValueError as e: return str(e)
    with ThreadPoolExecutor(n) as pool: return list(pool.map(go, range(n)))


def test_the_same_work_twice_at_once_is_done_once_and_whole(tmp_path, capsys):
    out = tmp_path/"a.jsonl"
    assert in_turns(out, lambda i: {"work": 1}, 4) == [None] * 4
    assert [json.loads(line)["row"] for line in open(out)] == [*range(6)] and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert capsys.readouterr().err.count(f"odesteer: another process has made {out}") == 3
    assert in_turns(out, lambda i: {"work": 1}, 1) == [None]  # asked for later, it is done again


def test_other_work_into_the_same_file_meanwhile_is_refused(tmp_path):
    out = tmp_path/"a.jsonl"
    first, second = in_turns(out, lambda i: {"work": i}, 2, pace=.05)
    assert first is None and "another process is at work here, with other settings" in second and "a.jsonl.lock" in second
    assert [json.loads(line)["row"] for line in open(out)] == [*range(6)]


def test_who_waits_goes_on_where_one_that_failed_stopped(tmp_path):
    out, made = tmp_path/"a.jsonl", []
    def go(fails):
        def batch(i):
            time.sleep(.02)
            if fails and i == 2: raise RuntimeError("the first fails")
            made.append(i)
            return [{"row": i}]
        if not fails: time.sleep(.01)
        try: write_batches(out, batch, range(4), {})
        except RuntimeError: pass
    with ThreadPoolExecutor(2) as pool: list(pool.map(go, (True, False)))
    assert [json.loads(line)["row"] for line in open(out)] == [*range(4)] == made


def test_two_processes_with_one_file_lose_nothing(tmp_path):
    code = ("import sys, time; from odesteer.runs import write_batches\n"
            "def batch(i): time.sleep(.05); return [{'row': i}]\n"
            "write_batches(sys.argv[1], batch, range(20), {'the': 'same'})")
    two = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"a.jsonl")], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in two]
    assert [p.returncode for p in two] == [0, 0] and [json.loads(line)["row"] for line in open(tmp_path/"a.jsonl")] == [*range(20)], said


def test_a_run_asked_for_twice_at_once_is_made_once(lm, tmp_path):
    seen, benches = [], [bench(lm, tmp_path) for _ in range(2)]
    for b in benches:
        judge = b.task.judge
        b.task.judge = lambda prompts, answers, judge=judge: seen.append(len(prompts)) or judge(prompts, answers)
    with ThreadPoolExecutor(2) as pool: one, two = pool.map(lambda b: b.run(), benches)
    assert one.summary == two.summary and sum(seen) == len(one.groups)


# ---- controllers: they act on all blocks, and are fitted on texts

def test_a_run_of_a_controller(lm, tmp_path, monkeypatch):
    b = bench(lm, tmp_path)
    run = b.run("alqr", None, {"T": 2.}, split="test")
    texts, items = b.task.folds[0].texts, [json.loads(line) for line in open(tmp_path/run.key/"answers.jsonl")]
    ctl = ods.make_steerer("alqr").fit(lm.model, lm.tokenizer, texts.pos, texts.neg, progress=False)
    with ods.steering(lm.model, ctl, strength=2.): by_hand = [a for s in (0, 4) for a in ods.generate_text(lm.model, lm.tokenizer, [i["prompt"] for i in items[s:s + 4]], seed=s, **b.task.decoding)]
    assert [i["answer"] for i in items] == by_hand and run.config["layer"] is None and "layer None" not in repr(run)
    assert "moved" not in run.summary and run.summary["effort"] == pytest.approx(effort_by_hand(lm, ctl.W_, items, lambda t, x: 2*ctl.mu_[t] - x @ ctl.V_[t]), rel=1e-3)
    monkeypatch.setattr(type(ctl), "fit", lambda *_, **__: 1/0)
    assert torch.equal(bench(lm, tmp_path).steerer("alqr", None, {}).W_, b.steerer("alqr", None, {}).W_)  # found on disk
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in lm.model.model.layers)


def effort_by_hand(lm, W, items, alpha):
    "Mean |u| / |x| over blocks and the tokens from the last of the prompt on, text by text and block by block, without hooks of ours"
    shares = []
    for i in items:
        prompt, ids = (lm.tokenizer(text, return_tensors="pt").input_ids for text in (i["prompt"], i["prompt"] + i["answer"]))
        n, at = prompt.shape[1], {}
        def block(t):
            def hook(module, args, out):
                y = (out[0] if isinstance(out, tuple) else out).clone()
                u = alpha(t, args[0][:, n - 1:])[..., None] * W[t]
                y[:, n - 1:] += u
                at[t] = (u.norm(dim=-1) / y[:, n - 1:].norm(dim=-1))[0]
                return (y, *out[1:]) if isinstance(out, tuple) else y
            return hook
        handles = [layer.register_forward_hook(block(t)) for t, layer in enumerate(lm.model.model.layers)]
        with torch.no_grad(): lm.model(ids)
        for h in handles: h.remove()
        shares += [torch.stack([at[t] for t in range(len(handles))]).mean(0)]
    return torch.cat(shares).mean().item()


@pytest.mark.parametrize("usual, least", [(0., .02), (-1.3, .02), (2.2, .05), (.61, 0.)])
@pytest.mark.parametrize("wanted", [.06, .1, .3])
def test_strength_at_an_effort(usual, least, wanted):
    asked = []
    def measure(x): asked.append(x); return math.hypot(least, .1*(x - usual))
    x = strength_at(measure, wanted, [-8., -4., -2., -1., 0., 1., 2., 4., 8., 16.])
    assert x > usual and measure(x) == pytest.approx(wanted, rel=.02) and len(asked) < 40
    with pytest.raises(ValueError, match="0.01 is not reached: the least is") if least else nullcontext(): strength_at(measure, .01, [-8., -4., -2., -1., 0., 1., 2., 4., 8.])
    with pytest.raises(ValueError, match="5 is not reached: it is"): strength_at(measure, 5., [0., 1., 2.])


def test_arms_of_equal_effort(lm, tmp_path, capsys):
    b = bench(lm, tmp_path, n=8)
    rows = [json.loads(line) for line in open(tmp_path/b.run().key/"answers.jsonl")]
    for method, layer, unit in (("caa", 1, "share"), ("alqr", None, "T"), ("pid-act", None, "T")):
        at = b.strength(method, layer, {"effort": .06})
        assert list(at) == [unit] and b.effort(method, layer, at, {}, rows) == pytest.approx(.06, rel=.02)
    ctl, lam = b.steerer("alqr", None, {}), b.strength("alqr", None, {"effort": .06})["T"]
    assert effort_by_hand(lm, ctl.W_, rows, lambda t, x: lam*ctl.mu_[t] - x @ ctl.V_[t]) == pytest.approx(.06, rel=.021)
    assert bench(lm, tmp_path, n=8).strength("alqr", None, {"effort": .06}, {"seed": 2}) == {"T": lam}  # once for all seeds, and from disk
    with pytest.raises(ValueError, match="an effort of 0.6 is not reached"): b.strength("caa", 1, {"effort": .6})


# ---- size

def test_memory_stays_flat_over_ten_thousand_items(tmp_path):
    def batch(i): return [{"i": j, "prompt": "p"*200, "answer": "a"*200} for j in range(i, i + 50)]
    def peak(n):
        tracemalloc.start()
        write_batches(tmp_path/f"{n}.jsonl", batch, range(0, n, 50), {})
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    peak(500)
    assert peak(10_000) < 1.5 * peak(500) and sum(1 for _ in open(tmp_path/"10000.jsonl")) == 10_000
