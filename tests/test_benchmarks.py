"The engine of the benchmarks: runs that survive anything, keys, the stop rule, sweeps, flat memory"
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.data import fit_on
from odesteer.tasks import Fold, Task, micro_task
from odesteer.runs import Bench, Paused, Run, canonical_params, read_run, run_key, strength_at, write_batches
from odesteer.sweeps import ABLATIONS, FULL, MICRO_PARAMS, SETPOINTS, Choice, ablation_arms, micro_bench, run_plan, stop_rule
from odesteer.results import find_runs, gather
from odesteer.report import main_table
from odesteer.sweeps import _closer, auto_layers
from odesteer.data import ContrastTexts, Prompt

from .project import ROOT


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


def small(lm, axis="truth", n=6, **changes):
    "A task of the micro world with few prompts"
    task = micro_task(lm, axis)
    fold, = task.folds
    rows = slice(0, 60)
    texts = ContrastTexts(fold.texts.pos[rows], fold.texts.neg[rows], fold.texts.pos_groups[rows], fold.texts.neg_groups[rows])
    task.folds, task.decoding = [Fold(texts, fold.val[:n], fold.test[:n])], task.decoding | {"max_new_tokens": 8}
    task.data = task.data | {"n": n}
    for k, v in changes.items(): setattr(task, k, v)
    return task


def bench(lm, out, batch_size=4, **changes): return Bench(lm.model, lm.tokenizer, small(lm, **changes), out, "micro", batch_size=batch_size)


def contents(out):
    "What the finished runs of a folder hold, without times"
    return {p.parent.name: ((p.parent/"scores.json").read_text(), [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(p.parent/"answers.jsonl")]) for p in Path(out).glob("*/summary.json")}


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
    with pytest.raises(TypeError, match="caa has no hyper-parameter steps; it has none"): canonical_params("caa", {"steps": 3})


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
    assert run.summary["means"]["info"] == np.mean(judged["info"]) and run.summary["n"] == 6 and run.summary["groups"] == len({i["group"] for i in items})
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
    np.testing.assert_array_equal(chosen.scores["true_info"], [float(x[0] > x[1]) for x in logp])
    seen = []
    b = bench(lm, tmp_path, samples=3, stop=(" is",), judge=lambda prompts, answers: seen.append(len(prompts)) or {"true_info": [float(" is" in a) for a in answers]})
    run = b.run()
    assert b.batch_size == 3 and seen == [3]*6 and len(run.groups) == 18 and run.scores["true_info"].sum() == 0


def test_a_judge_may_leave_items_undefined(lm, tmp_path):
    b = bench(lm, tmp_path, judge=lambda prompts, answers: {"true_info": [np.nan] + [1.]*(len(prompts) - 1)})
    run = b.run()
    assert np.isnan(run.scores["true_info"]).sum() == 2 and run.summary["means"]["true_info"] == 1. and "NaN" not in (tmp_path/run.key/"scores.json").read_text()


def test_a_damaged_steerer_or_lost_file_is_made_again_or_named(lm, tmp_path):
    b = bench(lm, tmp_path)
    b.steerer("caa", 1, {})
    card, = tmp_path.glob("steerers/*/steerer.safetensors")
    card.write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"): bench(lm, tmp_path).steerer("caa", 1, {})


def test_only_the_layers_of_a_sweep_are_read(lm, tmp_path):
    bench(lm, tmp_path).sweep("caa", layers=[-1, 1], strengths=(.2,), refine=0, repeats=1, allow=2.)
    assert sorted(p.name for p in (tmp_path/"activations").rglob("*.safetensors")) == ["layer_001.safetensors", "layer_003.safetensors"]


def test_what_was_judged_is_not_judged_again(lm, tmp_path, monkeypatch):
    seen, b = [], bench(lm, tmp_path)
    judge = b.task.judge
    b.task.judge = lambda prompts, answers: seen.append(len(prompts)) or judge(prompts, answers)
    monkeypatch.setattr(b, "moved", lambda *_: 1/0, raising=False)
    with pytest.raises(ZeroDivisionError): b.run("caa", 1, {"share": .3})
    monkeypatch.undo()
    b.run("caa", 1, {"share": .3})
    assert seen == [4, 2]


# ---- killed at random moments

KILL = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import odesteer as ods
from tests.test_benchmarks import bench
b = bench(ods.load_micro(), {out!r})
print("ready", flush=True)
b.benchmark(["caa", "random"], layers=[1, 2], strengths=(.2, .6), refine=1, repeats=2, seeds=1, allow=.9)
"""


def test_a_sweep_killed_at_random_moments_ends_like_an_undisturbed_one(lm, tmp_path):
    bench(lm, tmp_path/"whole").benchmark(["caa", "random"], layers=[1, 2], strengths=(.2, .6), refine=1, repeats=2, seeds=1, allow=.9)
    whole, rng, kills = contents(tmp_path/"whole"), random.Random(0), 0
    for attempt in range(40):
        p = subprocess.Popen([sys.executable, "-c", KILL.format(root=str(ROOT), out=str(tmp_path/"killed"))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        p.stdout.readline()
        time.sleep(rng.uniform(0, .6) if kills < 4 else 0)
        if kills < 4 and p.poll() is None: p.send_signal(signal.SIGKILL); kills += 1
        if p.wait() == 0: break
    assert kills >= 3 and p.returncode == 0
    assert contents(tmp_path/"killed") == whole
    read = lambda out: {p.name: json.loads(p.read_text()) for p in (tmp_path/out/"choices").iterdir()}
    assert read("killed") == read("whole") and len(read("whole")) == 2


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


def test_two_machines_merge(lm, tmp_path):
    whole = dict(layers=[1], strengths=(.2, .4), refine=0, repeats=1, seeds=2, allow=.9, params={})
    make = lambda axis, out: bench(lm, out, axis=axis)
    units = [("truth",), ("toxicity",)]
    for i in (1, 2): run_plan(units, ["caa"], make, part=(i, 2), out=tmp_path/str(i), **whole)
    run_plan(units, ["caa"], make, out=tmp_path/"one", **whole)
    parts = [contents(tmp_path/str(i)) for i in (1, 2)]
    assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == contents(tmp_path/"one")
    found = find_runs([tmp_path/"1", tmp_path/"2"])
    assert set(found.runs) == contents(tmp_path/"one").keys()


def test_time_that_is_used_up_pauses_between_runs(lm, tmp_path):
    b = Bench(lm.model, lm.tokenizer, small(lm), tmp_path, "micro", minutes=0)
    with pytest.raises(Paused): b.run()
    assert not contents(tmp_path)


def test_a_share_without_work_is_an_error(lm, tmp_path):
    with pytest.raises(ValueError, match="part 2 of 2 is empty"): run_plan([("truth",)], ["caa"], lambda axis, out: bench(lm, out), part=(2, 2), out=tmp_path)


# ---- the rule

def test_a_guardrail_that_nobody_can_measure_any_more_is_no_safety(lm):
    task, base = small(lm), fake(true_info=.2, info=1., wellformed=1.)
    gone = fake(true_info=.9, info=1., wellformed=1.)
    gone.scores["info"] = np.full(100, np.nan)
    assert stop_rule([.1, .2], base, [fake(true_info=.4, info=1., wellformed=1.), gone], task).index == 0


def fake(n=100, **rates):
    return Run("", {}, {m: np.repeat([1., 0.], [round(r*n), n - round(r*n)]) for m, r in rates.items()}, [*range(n)], {})


def test_the_rule_stops_before_a_guardrail_falls_and_says_so(lm):
    task, base = small(lm), fake(true_info=.2, info=1., wellformed=1.)
    at = lambda t, i, w=1.: fake(true_info=t, info=i, wellformed=w)
    stop = stop_rule([.1, .2, .4], base, [at(.4, .99), at(.6, .97), at(.9, .6)], task, allow=.15)
    assert stop.index == 1 and stop.ended and stop.why.startswith("stopped at 0.2: 0.4 changes info by -0.400 [") and "does not exclude a loss of 0.15" in stop.why
    assert stop_rule([.1, .2, .4], base, [at(.4, .99), at(.6, .97), at(.9, .6)], task, allow=.6).index == 2
    assert stop_rule([.1], base, [at(.9, .5)], task).index == -1
    degrades = stop_rule([.1, .2, .4], base, [at(.4, 1.), at(.7, 1.), at(.3, 1.)], task)
    assert degrades.index == 1 and "makes true_info worse by -0.400" in degrades.why
    useless = stop_rule([.1, .2], base, [at(.2, 1.), at(.05, 1.)], task)
    assert useless.index == -1 and "nothing weaker raised true_info" in useless.why
    free = stop_rule([.1, .2], base, [at(.4, 1.), at(.5, 1.)], task)
    assert free.index == 1 and not free.ended


def test_the_rule_for_a_metric_that_should_fall(lm):
    task = small(lm, axis="toxicity")
    run = lambda toxic, info: fake(toxic=toxic, info=info, true_info=.5, wellformed=1.)
    assert stop_rule([.1, .2, .4], run(.5, 1.), [run(.4, 1.), run(.1, 1.), run(.4, 1.)], task).index == 1


def test_a_set_point_that_pulls_the_wrong_way_is_passed_over(lm):
    task, base = small(lm), fake(true_info=.3, info=1., wellformed=1.)
    at = lambda t, i=1.: fake(true_info=t, info=i, wellformed=1.)
    runs = [at(.1), at(.2), at(.5), at(.6), at(.2)]
    assert stop_rule([.25, .5, 1, 2, 4], base, runs, task).index == -1
    stop = stop_rule([.25, .5, 1, 2, 4], base, runs, task, patient=True)
    assert stop.index == 3 and stop.ended and "stopped at 2: 4 makes true_info worse" in stop.why
    assert stop_rule([.25, .5, 1], base, [at(.1), at(.1, .5), at(.9)], task, patient=True).index <= 0  # guardrails are not passed over
    never = stop_rule([.25, .5], base, [at(.1), at(.1)], task, patient=True)
    assert never.index == -1 and not never.ended and "no steering at all" in never.why


def test_closer_strengths_are_half_way():
    points = [{"share": s} for s in (.1, .2, .4)]
    assert [p["share"] for p in _closer(points, 1)] == pytest.approx([.1, .141, .2, .283, .4], abs=1e-3)
    assert [p["share"] for p in _closer(points[:1], 0)] == pytest.approx([.05, .1])


def test_a_sweep_takes_the_layer_with_the_best_metric_at_its_stop(lm, tmp_path, monkeypatch):
    b, rates = bench(lm, tmp_path), {(None, None): (.2, 1.), (0, .1): (.3, 1.), (0, .2): (.9, .2), (1, .1): (.4, 1.), (1, .2): (.5, 1.), (1, .141): (.45, 1.)}
    def run(method=None, layer=None, strength=None, params={}, **kw):
        t, i = rates[layer, None if strength is None else strength["share"]]
        r = fake(true_info=t, info=i, wellformed=1.)
        return Run("", {}, r.scores, r.groups, {"means": {"true_info": t}})
    monkeypatch.setattr(b, "run", run, raising=False)
    choice = b.sweep("caa", layers=[0, 1], strengths=(.1, .2))
    assert (choice.layer, choice.strength) == (1, {"share": .2}) and [0, {"share": .2}, .9] in choice.trials
    assert b.sweep("caa", layers=[0, 1], strengths=(.1, .2)) == choice
    assert b.sweep("caa", layers=[0], strengths=(.1, .2), rule="best", refine=0).strength == {"share": .2}


def test_layers_to_try():
    from types import SimpleNamespace
    model = lambda n: SimpleNamespace(n=n)
    import odesteer.sweeps as B
    real = B.ods.decoder_layers
    try:
        B.ods.decoder_layers = lambda m: range(m.n)
        assert auto_layers(model(4)) == [0, 1, 2, 3] and auto_layers(model(32)) == [4, 7, 10, 13, 15, 18, 21, 24]
    finally: B.ods.decoder_layers = real


# ---- controllers: they act on all blocks, and are fitted on texts

def test_keys_of_old_do_not_change(lm, tmp_path):
    "The engine may grow, but must find again what was run before"
    b = micro_bench("speakers", 0, "truth", tmp_path)
    sketch = MICRO_PARAMS["speakers"]["odesteer"]
    keys = {("caa", 1, (("share", .4),), "val", 0): "46666bcd89526261", ("odesteer", 1, (("share", .4),), "val", 0): "d59e637b31a0119f", ("step-odesteer", 1, (("angle", 10),), "test", 0): "0e043043e9443d32", (None, None, None, "test", 2): "cade43d1ef19290d"}
    for (method, layer, strength, split, seed), key in keys.items():
        assert run_key(b.config(method, layer, strength and dict(strength), sketch if method in MICRO_PARAMS["speakers"] else {}, split, seed)) == key


def test_the_choice_of_a_sweep_keeps_its_name(lm, tmp_path, monkeypatch):
    b = micro_bench("speakers", 0, "truth", tmp_path)
    monkeypatch.setattr(b, "run", lambda method=None, *a, **k: fake(true_info=.2, info=1. if method is None else .1, wellformed=1.), raising=False)
    for method, key in (("caa", "5254b5e7865cac0a"), ("odesteer", "1bce0b1ed279cba4")):
        b.sweep(method, strengths=FULL["strengths"], params=MICRO_PARAMS["speakers"].get(method, {}), refine=2, repeats=2)
        assert (tmp_path/"choices"/f"{key}.json").exists(), [p.name for p in (tmp_path/"choices").iterdir()]


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


def test_a_sweep_of_a_controller_has_no_layers_and_its_own_strengths(lm, tmp_path, monkeypatch):
    b, asked = bench(lm, tmp_path), []
    def run(method=None, layer=None, strength=None, params={}, **kw):
        if method: asked.append((layer, *strength.items()))
        x = strength["T"] if strength else 0.
        r = fake(true_info=.2 + .1*min(x, 3.), info=1. if x < 3 else .5, wellformed=1.)
        return Run("", {}, r.scores, r.groups, {"means": {"true_info": r.scores["true_info"].mean()}})
    monkeypatch.setattr(b, "run", run, raising=False)
    choice = b.sweep("alqr", strengths=(.1, .2), refine=1, repeats=1)
    assert choice.layer is None and choice.strength == {"T": 2.83} and {a[0] for a in asked} == {None} and [a[1] for a in asked[:5]] == [("T", x) for x in SETPOINTS[:5]]
    assert b.sweep("alqr", strengths=(.1, .2), refine=1, repeats=1) == choice and b.sweep("alqr", layers=[2], strengths=(.3,), refine=1, repeats=1) == choice
    assert b.sweep("spid", strengths=[{"T": 1.}, {"T": 2.}], refine=0, repeats=1).strength == {"T": 2.}
    monkeypatch.setattr(b, "run", lambda method=None, *a, **k: fake(true_info=.2, info=1. if method is None else .1, wellformed=1.), raising=False)
    assert b.sweep("actadd-lfs", strengths=(.1,)).strength is None


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


def test_a_study_of_controllers_beside_steerers(lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ABLATIONS["closed loop"], "arms", [a for a in ABLATIONS["closed loop"]["arms"] if a[1] in ("caa", "spid", "alqr")])
    own = {"odesteer": {"n_components": 50}, "spid": {"kp": .3}}
    kw = dict(layers=[1], strengths=(.2,), refine=0, repeats=1, allow=2.)
    b = bench(lm, tmp_path)
    run_plan([("truth",)], ["odesteer", "caa", "alqr", "spid"], lambda axis, out: b, out=tmp_path, params=own, seeds=1, studies=["Jacobian", "closed loop"], **kw)
    found = gather(tmp_path, resamples=199)["scopes"][0]
    rows = {r["method"]: r for r in found["rows"]}
    assert rows["alqr"]["chosen"][0][0] is None and list(rows["alqr"]["chosen"][0][1]) == ["T"] and rows["alqr"]["effort"] > 0 and rows["spid"]["arm"] == "spid (kp=0.3)"
    assert [p[0] for p in found["curves"]["alqr"]["chosen"]] == [*SETPOINTS][:len(found["curves"]["alqr"]["chosen"])]
    met = {(arm, place) for arm, place, *_ in found["studies"]["closed loop"]}
    assert {("one block (CAA)", "effort 0.05"), ("A-LQR", "effort 0.05"), ("PID (S-PID)", "best"), ("A-LQR", "best")} <= met
    at = {(arm, place): v for arm, place, *v in found["studies"]["Jacobian"]}
    assert at["A-LQR, A = I", "effort 0.05"][-1] == pytest.approx(.05, rel=.5)  # effort on test
    table = main_table(found)
    assert next(row for row in table.cells() if row[0] == "alqr")[table.columns.index("layer")] == "all"


def test_folders_from_before_efforts_were_measured(lm, tmp_path):
    b = bench(lm, tmp_path)
    run = b.run("caa", 1, {"share": .3}, split="test"); b.run(split="test"); b.run()
    b.sweep("caa", layers=[1], strengths=(.3,), refine=0, repeats=1, allow=2.)
    path = tmp_path/run.key/"summary.json"
    summary = json.loads(path.read_text()); assert summary.pop("effort") > 0
    path.write_text(json.dumps(summary))
    row = next(r for r in gather(tmp_path, resamples=199)["scopes"][0]["rows"] if r["method"] == "caa")
    assert row["effort"] is None and row["moved"] > 0


def test_speed_is_measured_where_it_is_not_known(lm, tmp_path):
    b, one = bench(lm, tmp_path), ("caa", 1, {"share": .3}, {})
    first = b.speed([one], rounds=2, tokens=2)
    both = b.speed([one, ("alqr", None, {"T": 1.}, {})], rounds=2, tokens=2)
    assert both["caa"] == first["caa"] and len(both["alqr"]) == 2 and len(list((tmp_path/"speed").iterdir())) == 2
    assert b.speed([("caa", 1, {"share": .4}, {})], rounds=2, tokens=2)["caa"] != first["caa"]


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
