"Choosing on validation: the stop rule, sweeps, plans, ablations, speed"
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

import odesteer as ods
from odesteer.euler import load_class
from odesteer.report import main_table, strength_figure
from odesteer.results import find_runs, gather
from odesteer.runs import Paused, Run
from odesteer.sweeps import ABLATIONS, FULL, MICRO_PARAMS, QUICK, Plan, Search, Trial, ablation_arms, auto_layers, benchmark, compare_speed, micro_bench, plan_steps, ranked_sites, run_plan, stop_rule, strength_grid, sweep
from odesteer.sweeps import _closer

from .benches import bench, contents, fake, small
from .project import ROOT

SETPOINTS = [*load_class("alqr").strengths]


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


# ---- the rule

def test_a_guardrail_that_nobody_can_measure_any_more_is_no_safety(lm):
    task, base = small(lm), fake(true_info=.2, info=1., wellformed=1.)
    gone = fake(true_info=.9, info=1., wellformed=1.)
    gone.scores["info"] = np.full(100, np.nan)
    assert stop_rule([.1, .2], base, [fake(true_info=.4, info=1., wellformed=1.), gone], task).index == 0


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


# ---- searches

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
    search = Search([0, 1], (.1, .2))
    choice = sweep(b, "caa", search)
    assert (choice.layer, choice.strength) == (1, {"share": .2}) and Trial(0, {"share": .2}, .9) in choice.trials
    assert sweep(b, "caa", search) == choice
    assert sweep(b, "caa", Search([0], (.1, .2), rule="best", refine=0)).strength == {"share": .2}


def test_layers_to_try():
    from types import SimpleNamespace
    model = lambda n: SimpleNamespace(n=n)
    import odesteer.sweeps as B
    real = B.ods.decoder_layers
    try:
        B.ods.decoder_layers = lambda m: range(m.n)
        assert auto_layers(model(4)) == [0, 1, 2, 3] and auto_layers(model(32)) == [4, 7, 10, 13, 15, 18, 21, 24]
    finally: B.ods.decoder_layers = real


def test_only_the_layers_of_a_sweep_are_read(lm, tmp_path):
    sweep(bench(lm, tmp_path), "caa", Search([-1, 1], (.2,), refine=0, repeats=1, allow=2.))
    assert sorted(p.name for p in (tmp_path/"activations").rglob("*.safetensors")) == ["layer_001.safetensors", "layer_003.safetensors"]


def test_a_sweep_of_finished_runs_reads_no_texts(lm, tmp_path, monkeypatch):
    search = Search([1, 2], (.2,), refine=0, repeats=1, allow=2.)
    first = sweep(bench(lm, tmp_path), "caa", search)
    shutil.rmtree(tmp_path/"choices")
    monkeypatch.setattr(ods, "collect_activations", lambda *_, **__: 1/0, raising=False)
    assert sweep(bench(lm, tmp_path), "caa", search) == first


def test_the_layers_of_a_sweep_are_read_in_one_pass(lm, tmp_path, monkeypatch):
    passes, real = [], ods.collect_activations
    monkeypatch.setattr(ods, "collect_activations", lambda *a, **k: passes.append(a[3]) or real(*a, **k), raising=False)
    sweep(bench(lm, tmp_path), "caa", Search([1, 2], (.2,), refine=0, repeats=1, allow=2.))
    assert passes == [[1, 2]]


def test_the_choice_of_a_sweep_keeps_its_name(lm, tmp_path, monkeypatch):
    b = micro_bench("speakers", 0, "truth", tmp_path)
    monkeypatch.setattr(b, "run", lambda method=None, *a, **k: fake(true_info=.2, info=1. if method is None else .1, wellformed=1.), raising=False)
    for method, key in (("caa", "5254b5e7865cac0a"), ("odesteer", "1bce0b1ed279cba4")):
        sweep(b, method, FULL.search, MICRO_PARAMS["speakers"].get(method, {}))
        assert (tmp_path/"choices"/f"{key}.json").exists(), [p.name for p in (tmp_path/"choices").iterdir()]


BROKEN = ["", '{"config": ', "[]", "{}", '{"layer": 1, "strength": 3, "why": "", "trials": []}', "[" * 100_000, "\x00" * 99]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_choice_is_set_aside_and_made_again(lm, tmp_path, text, capsys):
    search = Search([1, 2], (.2,), refine=0, repeats=1, allow=2.)
    choice = sweep(bench(lm, tmp_path), "caa", search)
    file, = (tmp_path/"choices").glob("*.json")
    whole = file.read_text()
    file.write_text(text)
    assert sweep(bench(lm, tmp_path), "caa", search) == choice and file.read_text() == whole
    assert f"{file} is damaged; it is kept as {file.name}.damaged" in capsys.readouterr().err and file.with_name(f"{file.name}.damaged").read_text() == text
    assert sweep(bench(lm, tmp_path), "caa", search) == choice and not capsys.readouterr().err


@pytest.mark.parametrize("text", BROKEN[:4])
def test_damaged_rankings_and_speeds_are_made_again(lm, tmp_path, text, capsys):
    b, one = bench(lm, tmp_path), ("caa", 1, {"share": .3}, {})
    ranked, speeds = ranked_sites(b, ["last"]), compare_speed(b, [one], rounds=2, tokens=2)
    for folder in "sites", "speed":
        file, = (tmp_path/folder).glob("*.json")
        file.write_text(text)
        again = ranked_sites(b, ["last"]) if folder == "sites" else compare_speed(b, [one], rounds=2, tokens=2)
        assert repr(again) == repr(ranked) if folder == "sites" else again.keys() == speeds.keys()
        assert f"{file} is damaged" in capsys.readouterr().err and len([*(tmp_path/folder).glob("*.json")]) == 1


def test_a_sweep_of_a_controller_has_no_layers_and_its_own_strengths(lm, tmp_path, monkeypatch):
    b, asked = bench(lm, tmp_path), []
    def run(method=None, layer=None, strength=None, params={}, **kw):
        if method: asked.append((layer, *strength.items()))
        x = strength["T"] if strength else 0.
        r = fake(true_info=.2 + .1*min(x, 3.), info=1. if x < 3 else .5, wellformed=1.)
        return Run("", {}, r.scores, r.groups, {"means": {"true_info": r.scores["true_info"].mean()}})
    monkeypatch.setattr(b, "run", run, raising=False)
    choice = sweep(b, "alqr", Search(strengths=(.1, .2), repeats=1))
    assert choice.layer is None and choice.strength == {"T": 2.83} and {a[0] for a in asked} == {None} and [dict(a[1:]) for a in asked[:5]] == SETPOINTS[:5]
    assert sweep(b, "alqr", Search(repeats=1)) == choice and sweep(b, "alqr", Search([2], (.3,), repeats=1)) == choice
    assert sweep(b, "spid", Search(strengths=[{"T": 1.}, {"T": 2.}], refine=0, repeats=1)).strength == {"T": 2.}
    monkeypatch.setattr(b, "run", lambda method=None, *a, **k: fake(true_info=.2, info=1. if method is None else .1, wellformed=1.), raising=False)
    assert sweep(b, "actadd-lfs", Search(strengths=(.1,))).strength is None


# ---- killed at random moments, plans

KILL = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import odesteer as ods
from odesteer.sweeps import Search, benchmark
from tests.benches import bench
b = bench(ods.load_micro(), {out!r})
print("ready", flush=True)
benchmark(b, ["caa", "random"], Search([1, 2], (.2, .6), refine=1, repeats=2, seeds=1, allow=.9))
"""


def test_a_sweep_killed_at_random_moments_ends_like_an_undisturbed_one(lm, tmp_path):
    benchmark(bench(lm, tmp_path/"whole"), ["caa", "random"], Search([1, 2], (.2, .6), refine=1, repeats=2, seeds=1, allow=.9))
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


def test_two_machines_merge(lm, tmp_path):
    plan = Plan([("truth",), ("toxicity",)], ["caa"], Search([1], (.2, .4), refine=0, repeats=1, seeds=2, allow=.9))
    make = lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs)
    for i in (1, 2): run_plan(replace(plan, part=(i, 2)), make, tmp_path/str(i))
    run_plan(plan, make, tmp_path/"one")
    parts = [contents(tmp_path/str(i)) for i in (1, 2)]
    assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == contents(tmp_path/"one")
    found = find_runs([tmp_path/"1", tmp_path/"2"])
    assert set(found.runs) == contents(tmp_path/"one").keys()


def test_a_share_without_work_is_an_error(lm, tmp_path):
    with pytest.raises(ValueError, match="part 2 of 2 is empty"): run_plan(Plan([("truth",)], ["caa"], part=(2, 2)), lambda *_, **__: 1/0, tmp_path)


def test_a_plan_of_no_time_pauses_before_its_first_run(lm, tmp_path):
    plan = Plan([("truth",)], ["caa"], Search([1], (.2,)))
    with pytest.raises(Paused): run_plan(plan, lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs), tmp_path, minutes=0)
    assert not contents(tmp_path)


def test_the_steps_of_a_plan():
    plan = Plan([("a", "truth"), ("b", "toxicity")], ["caa"], studies=["metric", "closed loop"], rounds=2)
    steps = [(s.unit[-1], s.kind, s.name) for s in plan_steps(plan)]
    assert steps == [*((u, k, n) for u in ("truth", "toxicity") for k, n in (("unsteered", ""), ("method", "caa"), ("speed", ""))),
                     ("truth", "study", "metric"), ("truth", "study", "closed loop"), ("toxicity", "study", "closed loop")]
    assert [s.name for s in plan_steps(replace(plan, studies="all"))][6:18] == list(ABLATIONS)
    assert plan.params_of(("a", "truth")) == {} and replace(plan, params={"a": {"caa": {}}}).params_of(("a", "truth")) == {"caa": {}}
    with pytest.raises(ValueError, match="there is no ablation 'solvers'"): Plan(studies=["solvers"])
    with pytest.raises(ValueError, match="part must be"): Plan(part=(3, 2))


def test_a_plan_in_a_file_comes_back(tmp_path):
    "Lists come back as lists, and that is all that changes"
    text = json.dumps(asdict(QUICK))
    saved = json.loads(text)
    assert json.dumps(asdict(Plan(**saved | {"search": Search(**saved["search"])}))) == text


@pytest.mark.parametrize("wrong, words", [
    (dict(rule="luck"), "'stop' or 'best', got 'luck'"), (dict(allow=-1), "allow must be"), (dict(allow=math.nan), "allow must be"),
    (dict(refine=-1), "refine must be"), (dict(repeats=0), "repeats must be"), (dict(seeds=0), "seeds must be"), (dict(seeds=[]), "seeds must be"),
    (dict(strengths=()), "strengths must be"), (dict(strengths=(.4, .2)), "ascending"), (dict(strengths=[{"T": 1.}, {"share": 2.}]), "one unit"),
    (dict(strengths={("t", "caa"): [{"level": .5, "share": 1.}]}), "one unit"), (dict(strengths=(.1, math.inf)), "ascending")])
def test_a_search_that_cannot_be_meant(wrong, words):
    with pytest.raises(ValueError, match=words): Search(**wrong)


def test_strengths_of_a_search():
    assert strength_grid("caa") == strength_grid("odesteer") == [{"spread": s} for s in (.25, .4, .6, .85, 1.2, 1.7, 2.4)]
    for grid in [{"T": 1.}, {"T": 2.}], [{"spread": .5}, {"spread": 1.}]: assert strength_grid("caa", grid) == grid
    assert strength_grid("alqr", [{"spread": 1.}]) == SETPOINTS
    for plan in QUICK, FULL: assert strength_grid("caa", plan.search.strengths) == [{"share": s} for s in plan.search.strengths]  # the committed runs
    assert strength_grid("alqr") == strength_grid("alqr", (.1, .2)) == SETPOINTS and strength_grid("alqr", [{"T": 1.}]) == [{"T": 1.}]
    assert Search().test_seeds == [0, 1, 2] and Search(seeds=[42, 43]).test_seeds == [42, 43]


def test_a_sweep_in_spreads_from_the_choice_to_the_report(lm, tmp_path):
    b, odesteer = bench(lm, tmp_path), {"n_components": 50}
    search = Search([1], [{"spread": .4}, {"spread": .8}], refine=1, repeats=1, allow=2., seeds=1)
    for method, own in ("caa", {}), ("odesteer", odesteer): benchmark(b, [method], search, {method: own})
    choice = sweep(b, "caa", search)
    assert list(choice.strength) == ["spread"] and {tuple(t.strength) for t in choice.trials} == {("spread",)}
    run = b.run("caa", 1, choice.strength, split="test")
    caa = b.steerer("caa", 1, {})
    far = float(choice.strength["spread"] * caa.spread_ / b.acts(0, 1)[len(b.task.folds[0].texts.pos):].norm(dim=-1).median())
    assert run.summary["moved"] == pytest.approx(far, rel=.1)
    scope = gather(tmp_path, resamples=99)["scopes"][0]
    assert scope["units"] == {"caa": "spread", "odesteer (n_components=50)": "spread"}
    assert {.4, .8} <= {p[0] for p in scope["curves"]["caa"]["chosen"]} and "strength: multiple of the spread" in main_table(scope).note
    _, value = next(iter(choice.strength.items())), f"{choice.strength['spread']:g}"
    table = main_table(scope)
    assert next(row for row in table.cells() if row[0] == "caa")[table.columns.index("strength")] == value
    assert strength_figure(scope).get_supxlabel() == "strength, multiple of the spread (dotted: chosen)"


def test_arms_of_a_study_meet_in_the_unit_of_the_search(lm, tmp_path, monkeypatch):
    assert {tuple(s) for a in ablation_arms("steps", spreads=(.4, .8)) for s in a.strengths} == {("spread",)}
    assert [s for s in ablation_arms("stop level", spreads=(.4, .8))[0].strengths if "level" in s][0] == {"level": .1, "spread": .8}
    assert ablation_arms("steps")[0].strengths == [{"share": s} for s in (.15, .3, .6)]
    monkeypatch.setitem(ABLATIONS, "steps", replace(ABLATIONS["steps"], arms=ABLATIONS["steps"].arms[:2]))
    own = {"odesteer": {"n_components": 50}}
    search = Search([1], [{"spread": .4}], refine=0, repeats=1, allow=2., seeds=1)
    run_plan(Plan([("truth",)], ["odesteer"], search, own, ["steps"]), lambda axis, out, **kwargs: bench(lm, out, **kwargs), tmp_path)
    found = gather(tmp_path, resamples=99)["scopes"][0]["studies"]["steps"]
    assert {r.place for r in found} == {"spread 0.4", "spread 0.8", "spread 1.6", "spread (mean of 3)"}


# ---- studies and speed

def test_a_study_of_controllers_beside_steerers(lm, tmp_path, capsys, monkeypatch):
    study = ABLATIONS["closed loop"]
    monkeypatch.setitem(ABLATIONS, "closed loop", replace(study, arms=[a for a in study.arms if a.method in ("caa", "spid", "alqr")]))
    own = {"odesteer": {"n_components": 50}, "spid": {"kp": .3}}
    search = Search([1], (.2,), refine=0, repeats=1, allow=2., seeds=1)
    plan = Plan([("truth",)], ["odesteer", "caa", "alqr", "spid"], search, own, ["Jacobian", "closed loop"])
    run_plan(plan, lambda axis, out, **kwargs: bench(lm, out, **kwargs), tmp_path)
    found = gather(tmp_path, resamples=199)["scopes"][0]
    rows = {r["method"]: r for r in found["rows"]}
    assert rows["alqr"]["chosen"][0][0] is None and list(rows["alqr"]["chosen"][0][1]) == ["T"] and rows["alqr"]["effort"] > 0 and rows["spid"]["arm"] == "spid (kp=0.3)"
    assert [{"T": p[0]} for p in found["curves"]["alqr"]["chosen"]] == SETPOINTS[:len(found["curves"]["alqr"]["chosen"])]
    met = {(arm, place) for arm, place, *_ in found["studies"]["closed loop"]}
    assert {("one block (CAA)", "effort 0.05"), ("A-LQR", "effort 0.05"), ("PID (S-PID)", "best"), ("A-LQR", "best")} <= met
    at = {(arm, place): v for arm, place, *v in found["studies"]["Jacobian"]}
    assert at["A-LQR, A = I", "effort 0.05"][-1] == pytest.approx(.05, rel=.5)  # effort on test
    table = main_table(found)
    assert next(row for row in table.cells() if row[0] == "alqr")[table.columns.index("layer")] == "all"


def test_folders_from_before_efforts_were_measured(lm, tmp_path):
    b = bench(lm, tmp_path)
    run = b.run("caa", 1, {"share": .3}, split="test")
    b.run(split="test")
    sweep(b, "caa", Search([1], (.3,), refine=0, repeats=1, allow=2.))
    path = tmp_path/run.key/"summary.json"
    summary = json.loads(path.read_text()); assert summary.pop("effort") > 0
    path.write_text(json.dumps(summary))
    row = next(r for r in gather(tmp_path, resamples=199)["scopes"][0]["rows"] if r["method"] == "caa")
    assert row["effort"] is None and row["moved"] > 0


def test_speed_is_measured_where_it_is_not_known(lm, tmp_path):
    b, one = bench(lm, tmp_path), ("caa", 1, {"share": .3}, {})
    first = compare_speed(b, [one], rounds=2, tokens=2)
    both = compare_speed(b, [one, ("alqr", None, {"T": 1.}, {})], rounds=2, tokens=2)
    assert both["caa"] == first["caa"] and len(both["alqr"]) == 2 and len(list((tmp_path/"speed").iterdir())) == 2
    assert compare_speed(b, [("caa", 1, {"share": .4}, {})], rounds=2, tokens=2)["caa"] != first["caa"]


# ---- variants of a method

def test_a_variant_has_a_choice_a_row_and_a_name_of_its_own(lm, tmp_path):
    from odesteer.results import gather
    from odesteer.report import beats, forest_figure, layer_figure, main_table, pareto_figure, strength_figure
    names = ["odesteer", "odesteer:metric=covariance", "odesteer:steps=3:gamma=1.0", "caa", "random"]
    small_sketch = {"odesteer": {"n_components": 64}}
    plan = Plan([("truth",)], names, Search([1, 2], (.2, .6), refine=0, repeats=1, seeds=1, allow=5), params=small_sketch)
    run_plan(plan, lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs), tmp_path)
    found = [json.loads(p.read_text())["config"] for p in (tmp_path/"choices").glob("*.json")]
    assert sorted(c.get("name", c["method"]) for c in found) == sorted(names)
    assert {c.get("name"): c["params"] for c in found if c["method"] == "odesteer"} == {None: {"n_components": 64}, names[1]: {"metric": "covariance", "n_components": 64}, names[2]: {"gamma": 1., "n_components": 64, "steps": 3}}
    scope, = gather([tmp_path])["scopes"]
    rows = {r.get("name", r["method"]): r for r in scope["rows"]}
    assert list(rows)[2:] == ["caa", "odesteer", *names[1:3], "random"]
    table = main_table(scope).markdown()
    assert all(name in table for name in names) and "odesteer:metric=covariance" in str(beats(scope, ["random"], "better than chance?").evidence)
    for figure in (forest_figure, layer_figure, pareto_figure, strength_figure): assert figure(scope)
    plain = Plan([("truth",)], ["odesteer"], plan.search, params=small_sketch)
    before = {p.name for p in (tmp_path/"choices").glob("*.json")}
    run_plan(plain, lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs), tmp_path)
    assert {p.name for p in (tmp_path/"choices").glob("*.json")} == before  # the same name, the same choice


def test_names_of_variants():
    from odesteer.sweeps import variant
    assert variant("odesteer:C=100:metric=covariance", {"odesteer": {"C": 1., "gamma": 2.}}) == ("odesteer", {"C": 100, "gamma": 2., "metric": "covariance"})
    for wrong in ("odesteer:", "odesteer:metric", "odesteer:=3"):
        with pytest.raises(ValueError, match="is no setting: write a variant as odesteer:metric=covariance"): variant(wrong)


def test_draws_of_a_placebo_are_one_row(lm, tmp_path):
    "Whatever the seed, a random direction is one arm: its row is the mean, and says what each draw did"
    from odesteer.results import find_runs, gather
    plan = Plan([("truth",)], ["caa", "random", "random:seed=1", "random:seed=2"], Search([1], (.6,), refine=0, repeats=1, seeds=1, rule="best"))
    run_plan(plan, lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs), tmp_path)
    scope, = gather([tmp_path], resamples=99)["scopes"]
    rows = {r.get("name", r["method"]): r for r in scope["rows"]}
    assert list(rows)[2:] == ["caa", "random"] and "draws" not in rows["caa"]
    drawn = rows["random"]["draws"]
    assert [seed for seed, _ in drawn] == [0, 1, 2] and len(rows["random"]["answers"]) == 3
    for seed, means in drawn:
        run, = (r for r in find_runs([tmp_path]).runs.values() if r.config["split"] == "test" and r.config["method"] == "random" and r.config["params"].get("seed", 0) == seed)
        for m in scope["primary"], *scope["watch"]: assert abs(means[m] - np.nanmean(run.scores[m])) < 1e-3
    assert abs(np.mean([means[scope["primary"]] for _, means in drawn]) - rows["random"]["metrics"][scope["primary"]][0]) < 1e-3


def test_a_report_while_a_comparison_is_running(lm, tmp_path):
    "An arm whose choice is made and whose test is not run yet waits for its row, and stops no figure"
    from odesteer.report import figures, tables
    from odesteer.results import find_runs, gather
    plan = Plan([("truth",)], ["caa", "random"], Search([1, 2], (.2, .6), refine=0, repeats=1, seeds=1, rule="best"))
    run_plan(plan, lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs), tmp_path)
    run, = (r for r in find_runs([tmp_path]).runs.values() if r.config["split"] == "test" and r.config.get("method") == "random")
    shutil.rmtree(tmp_path/run.key)
    results = gather([tmp_path], resamples=99)
    scope, = results["scopes"]
    assert [r["arm"] for r in scope["rows"]] == ["unsteered", "prompt", "caa"] and list(scope["curves"]) == ["caa"]
    assert list(figures(results)) and tables(results)
