"Results of made-up studies whose answers are known: numbers by hand, merging, damage, what meets what"
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import odesteer as ods
import odesteer.results as results_module
from odesteer.results import Chosen, Interval, MetricRow, PairRow, StudyRow, as_results, committed, find_runs, gather, make_units, place
from odesteer.runs import resolve_strength, rotation, run_key, time_at_angle
from odesteer.statistics import bootstrap_interval
from odesteer.sweeps import ABLATIONS, ablation_arms

from .studies import SPEC, Study, make_toy, quick, row


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def results(toy): return quick(toy)


def test_numbers_by_hand(tmp_path):
    s = Study(tmp_path, world=None, groups=3)
    nan = np.nan
    for seed, x in enumerate(([0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 1, 1])): s.run("none", seed=seed, scores={"reward": np.array(x, float), "info": np.ones(6)})
    s.choice("caa")
    for seed, x in enumerate(([1, 1, 0, nan, 1, 0], [1, 1, 0, 1, 1, 0])):
        s.run("steer", "caa", {}, 1, {"share": .4}, seed=seed, scores={"reward": np.array(x, float), "info": np.r_[np.ones(5), 0.]})
    r = row(quick(tmp_path, resamples=999), "caa")
    items, before = np.array([1, 1, 0, 1, 1, 0.]), np.array([0, .5, 0, 0, 1, 1])  # seeds averaged per item, over the defined ones
    reward = r["metrics"]["reward"]
    assert r["seeds"] == 2 and r["n"] == 6 and reward.mean.value == pytest.approx(items.mean(), abs=1e-4)
    assert reward.change.value == pytest.approx((items - before).mean(), abs=1e-4)
    assert reward.worse.value == pytest.approx(1/6, abs=1e-4)  # one item of six was made worse
    e = bootstrap_interval(items - before, s.groups, resamples=999)
    assert [reward.change.lo, reward.change.hi] == pytest.approx([e.lo, e.hi], abs=1e-4)
    assert r["metrics"]["info"].change.value == pytest.approx(-1/6, abs=1e-4)
    wins = 1 + 1 + .5 + .5 + 0 + 1 + .5 + .5 + 1 + .5 + 0  # same seeds, ties one half, the undefined pair left out
    assert r["win"].value == pytest.approx(wins / 11, abs=1e-4)
    assert r["reward P90"].value == 1


def test_interval_has_the_width_of_independent_questions(tmp_path):
    s = Study(tmp_path, groups=100).base().method("caa", .5)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=100).repeat(2), rng.normal(size=100).repeat(2)  # the two prompts of a question agree: 100 pieces of evidence, not 200
    for arm, x in (("none", a), ("steer", b)):
        s.run(arm, *(("caa", {}, 1, {"share": .4}) if arm == "steer" else ()), scores={"reward": x, "info": np.ones(200)})
    change = row(quick(tmp_path, resamples=1999), "caa")["metrics"]["reward"].change
    assert change.hi - change.lo == pytest.approx(2*1.96*(b - a)[::2].std()/10, rel=.15)


def test_known_effects_are_found_and_pooled(results):
    pool, *parts = results["scopes"]
    assert [s["part"] for s in results["scopes"]] == [False, True, True] and pool["n"] == 80 and pool["groups"] == 40 and len(pool["models"]) == 2
    for arm, effect in {"caa": .3, "odesteer": .6, "random": 0., "prompt": .1}.items():
        d, lo, hi = row(results, arm)["metrics"]["reward"].change
        assert lo - .02 <= effect <= hi + .02 and abs(d - effect) < .06
        both = [row(results, arm, k)["metrics"]["reward"].change for k in (1, 2)]
        assert d == pytest.approx(np.mean([b.value for b in both]), abs=1e-3) and hi - lo < max(b.hi - b.lo for b in both)
    assert row(results, "caa")["speed"] == Interval(.8, .8, .8)
    assert row(results, "caa")["chosen"] == [Chosen(layer=1, strength={"share": .4})]*2
    pair, = (p for p in pool["pairs"] if (p.arm, p.other) == ("odesteer", "caa"))
    assert pair.difference.lo < .3 < pair.difference.hi and pair.p < .05 and pair.n == 80


def test_where_nothing_is_safe_steering_is_off(tmp_path, results):
    off = row(results, "repe")
    assert off["off"] == 2 and off["metrics"]["reward"].change == Interval(0, 0, 0)
    for k in range(2):
        s = Study(tmp_path, f"toy {k}").base()
        if k: s.method("caa", 1.)
        else: s.choice("caa", layer=None, strength=None)
    r = quick(tmp_path)
    pool, second = (row(r, "caa", k)["metrics"]["reward"].change.value for k in (0, 2))
    assert pool == pytest.approx(second/2, abs=1e-3) and row(r, "caa")["off"] == 1  # half of the items did not move


def test_machines_merge(tmp_path, toy, results):
    one, two = tmp_path/"one", tmp_path/"two"
    for i, path in enumerate(sorted(p for p in toy.iterdir() if p.name != "choices")):
        for home in ((one, two) if i % 3 == 0 else (one,) if i % 3 == 1 else (two,)): shutil.copytree(path, home/path.name)
    for home in (one, two): shutil.copytree(toy/"choices", home/"choices")
    merged = quick([one, two])
    assert {k: v for k, v in merged.items() if k not in ("runs", "seconds", "machines", "scopes")} == {k: v for k, v in results.items() if k not in ("runs", "seconds", "machines", "scopes")}
    numbers = lambda r: [{**s, "rows": [{k: v for k, v in x.items() if k != "speed"} for x in s["rows"]]} for s in r["scopes"]]  # which machine an unsteered run was on matters for speed
    assert numbers(merged) == numbers(results) and merged["runs"]["repeated"] > 0 and merged["runs"]["finished"] == results["runs"]["finished"]


def test_speed_is_compared_on_one_machine_only(tmp_path):
    fast, slow = tmp_path/"fast", tmp_path/"slow"
    s = Study(fast)
    s.run("none", tps=1000.)
    s.run("none", tps=100., root=slow)
    for method, tps, home in (("caa", 900., fast), ("iti", 50., slow)):
        s.choice(method, root=home)
        s.run("steer", method, {}, 1, {"share": .4}, tps=tps, root=home)
    r = quick([fast, slow])
    assert row(r, "caa")["speed"].value == .9 and row(r, "iti")["speed"].value == .5 and r["runs"]["repeated"] == 1
    assert {m["device"] for m in r["machines"]} == {"cpu"} and r["seconds"] == 8


@pytest.mark.parametrize("change", [dict(answer="b"), dict(scores={"reward": np.zeros(40), "info": np.ones(40)}), dict(scores={"reward": np.zeros(40)})])
def test_two_contents_for_one_run_are_an_error(tmp_path, change):
    a, b = tmp_path/"a", tmp_path/"b"
    path = Study(a).run("none")
    Study(b).run("none", **change)
    with pytest.raises(ValueError, match=path.name): find_runs([a, b])


def test_two_choices_for_one_sweep_are_an_error(tmp_path):
    for name, share in (("a", .2), ("b", .4)):
        s = Study(tmp_path/name)
        s.run("none")
        path = s.choice("caa", strength={"share": share})
    with pytest.raises(ValueError, match=path.stem): find_runs([tmp_path/"a", tmp_path/"b"])


@pytest.mark.parametrize("name, text", [("scores.json", '{"reward": [1, 2'), ("scores.json", '{"reward": [1, 2], "info": [1, 1]}'), ("config.json", "{}"), ("config.json", ""), ("answers.jsonl", '{"i": 0}\n'),
                                        ("answers.jsonl", "\x00\x00"), ("summary.json", "[]"), ("summary.json", '{"tokens_per_second": null}'), ("scores.json", None)])
def test_damaged_runs_are_skipped_counted_and_named(tmp_path, name, text, capsys):
    s = Study(tmp_path).base().method("caa", .3)
    whole = quick(tmp_path)
    broken = s.run("steer", "iti", {}, 1, {"share": .4})
    (broken/name).unlink()
    if text is not None: (broken/name).write_text(text)
    after = quick(tmp_path)
    assert after["runs"] == whole["runs"] | {"damaged": 1} and after["scopes"] == whole["scopes"]
    said = capsys.readouterr().err
    assert said.startswith(f"odesteer: left out: {broken}") and said.count("\n") == 1


@pytest.mark.parametrize("key", ["task", "data", "model", "arm", "method", "params", "layer", "strength", "split", "seed"])
def test_a_run_whose_config_lacks_a_part_is_left_out(tmp_path, key, capsys):
    s = Study(tmp_path).base().method("caa", .3)
    whole, broken = quick(tmp_path), s.run("steer", "iti", {}, 1, {"share": .4})
    config = {k: v for k, v in json.loads((broken/"config.json").read_text()).items() if k != key}
    (broken/"config.json").write_text(json.dumps(config))
    broken.rename(tmp_path/run_key(config))
    assert quick(tmp_path)["scopes"] == whole["scopes"] and run_key(config) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {}}', "[" * 100_000])
@pytest.mark.parametrize("folder", ["choices", "speed", "guardrails"])
def test_damaged_small_files_are_left_out_and_named(tmp_path, folder, text, capsys):
    Study(tmp_path).base().method("caa", .3)
    whole = quick(tmp_path)
    (tmp_path/folder).mkdir(exist_ok=True)
    (tmp_path/folder/"x.json").write_text(text)
    after = quick(tmp_path)
    assert after["runs"]["damaged"] == 1 and after["scopes"] == whole["scopes"] and str(tmp_path/folder/"x.json") in capsys.readouterr().err


def test_unfinished_runs_and_strangers_are_no_runs(tmp_path):
    s = Study(tmp_path).base().method("caa", .3)
    (s.run("steer", "iti", {}, 1, {"share": .4})/"summary.json").unlink()
    for stranger in ("activations", "report", "0123"): (tmp_path/stranger).mkdir()
    (tmp_path/"choices"/"x.json").write_text("{")
    r = quick(tmp_path)
    assert r["runs"] == {"finished": 5, "repeated": 0, "unfinished": 1, "damaged": 1} and len(r["scopes"]) == 1


def test_runs_that_were_asked_other_questions_do_not_mix(tmp_path):
    Study(tmp_path).base()
    path = Study(tmp_path, groups=21).run("steer", "caa", {}, 1, {"share": .4})
    with pytest.raises(ValueError, match="asked other questions"): quick(tmp_path)
    shutil.rmtree(path)
    assert quick(tmp_path)["scopes"][0]["n"] == 40


def test_arms_are_told_apart_by_what_differs_from_the_defaults(tmp_path):
    s = Study(tmp_path).base().method("odesteer", .3)
    for seed in (1, 2): s.run("steer", "odesteer", {"steps": 10, "seed": seed}, 1, {"share": .4}, seed=seed, effect=.3)
    s.run("steer", "odesteer", {"steps": 3}, 1, {"share": .4})
    unit, = make_units(find_runs(tmp_path))
    assert len(unit.chosen("odesteer")) == 3 and unit.mains() == {"odesteer": "odesteer"} and "odesteer (steps=3)" in unit.arms


def test_the_main_row_is_that_of_the_widest_sweep(tmp_path):
    s = Study(tmp_path).base()
    s.choice("odesteer", {"gamma": 10.}, layer=2, layers=(1, 2))  # as configured
    s.choice("odesteer", {}, layer=2, layers=[2])  # an arm of an ablation, with fewer settings
    s.choice("odesteer", {"gamma": 10.}, layer=2, layers=[2], strength={"share": .2})
    for params, share, effect in (({"gamma": 10.}, .4, .5), ({}, .4, .1), ({"gamma": 10.}, .2, .3)): s.run("steer", "odesteer", params, 2, {"share": share}, effect=effect)
    r = quick(tmp_path)
    assert [x["arm"] for x in r["scopes"][0]["rows"]] == ["unsteered", "odesteer (gamma=10.0)"]
    assert row(r, "odesteer (gamma=10.0)")["chosen"] == [Chosen(layer=2, strength={"share": .4})]
    best = {s.arm: s.value for s in r["scopes"][0]["studies"]["gamma and C"] if s.place == "best"}
    mean = Study(tmp_path).luck.mean()
    assert best == pytest.approx({"as configured": mean + .3, "gamma 0.1, C 1": mean + .1}, abs=.06)


def test_a_study_compares_its_arms_where_they_meet(results):
    rows = {(s.arm, s.place): s for s in results["scopes"][0]["studies"]["solver"]}
    assert {place for _, place in rows} == {"share 0.2", "share 0.4", "share (mean of 2)"}
    for arm in ("midpoint", "rk4"):
        mean = rows[arm, "share (mean of 2)"].difference
        single = [rows[arm, f"share {s}"].difference for s in (.2, .4)]
        assert mean.value == pytest.approx(np.mean([d.value for d in single]), abs=1e-3)
        assert mean.hi - mean.lo < single[0].hi - single[0].lo
    assert rows["rk4", "share (mean of 2)"].difference.hi < 0 and rows["euler", "share 0.4"].difference is None
    levels = results["scopes"][0]["studies"]["stop level"]
    walked_on = rows["euler", "share 0.4"].value
    assert len(levels) == 2 and all(s.value - s.change == pytest.approx(walked_on, abs=1e-3) for s in levels)
    best = {s.arm: s for s in results["scopes"][0]["studies"]["multistep"] if s.place == "best"}
    assert best["one step"].change == pytest.approx(-.1, abs=.05)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): gather(tmp_path/"missing")
    with pytest.raises(ValueError, match="no finished run"): gather(tmp_path)
    with pytest.raises(ValueError, match="'solver'"): ablation_arms("solvers")
    path = Study(tmp_path).run("none")
    summary = json.loads((path/"summary.json").read_text())
    del summary["task"]
    (path/"summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="give tasks="): gather(tmp_path)
    assert gather(tmp_path, tasks={"toy": SPEC}, resamples=99)["scopes"][0]["primary"] == "reward"


# The stored form

def test_results_are_lists_in_json_and_have_names_in_python(results):
    stored = json.loads(json.dumps(results, allow_nan=False))
    assert as_results(stored) == results and as_results(results) == results and stored != results
    assert json.dumps(as_results(stored)) == json.dumps(results)
    caa = stored["scopes"][0]["rows"][2]
    assert caa["arm"] == "caa" and [len(caa["metrics"][m]) for m in ("reward", "info")] == [9, 7] and len(caa["win"]) == 3
    assert len(stored["scopes"][1]["rows"][2]["metrics"]["info"]) == 6  # brief: what nobody asked for is left off
    assert {len(p) for p in stored["scopes"][0]["pairs"]} == {7} and {len(s) for s in stored["scopes"][0]["studies"]["solver"]} == {13}
    curve = stored["scopes"][0]["curves"]["caa"]
    assert [p[0] for p in curve["1"]] == [.2, .4] and {len(p) for p in curve["1"]} == {2} and {len(p) for p in curve["chosen"]} == {5}


def test_results_that_come_with_the_package_are_read_as_they_were_written():
    asset = Path(results_module.__file__).parent/"assets"/"bench-micro.json"
    assert json.dumps(committed(), separators=(",", ":")) == json.dumps(json.loads(asset.read_text()), separators=(",", ":"))
    assert isinstance(committed()["scopes"][0]["pairs"][0], PairRow) and "scopes" not in committed("speed")


def test_what_is_not_known_is_none_not_an_error():
    assert MetricRow().mean is None and MetricRow([.5]).mean == Interval(.5) and not MetricRow([.5]).mean.known
    m = MetricRow([.5, .4, .6, .1, 0., .2, .25])
    assert m.change == Interval(.1, 0., .2) and m.worse == Interval(.25) and MetricRow(m[:6]).worse is None and MetricRow(m[:3]).change is None
    assert StudyRow(*["a", "best", .5, .4, .6], *[None]*7).effort is None  # older results know no effort


# What studies promise to results

@pytest.mark.parametrize("study", ABLATIONS)
def test_arms_of_an_ablation_can_be_made_and_differ(study):
    arms = ablation_arms(study, {"odesteer": {"n_components": 50, "gamma": 10.}})
    assert arms[0].reference and not any(a.reference for a in arms[1:]) and len({json.dumps([a.method, a.params]) for a in arms}) == len(arms)
    for a in arms:
        s = ods.make_steerer(a.method, **a.params)
        if a.method == "odesteer": assert s.n_components == 50 and (s.gamma == 10. or study in ("gamma and C", "cross-validation"))
    assert all(json.loads(json.dumps(s)) == s for a in arms for s in a.strengths)


def test_a_matched_angle_is_matched():
    g = torch.Generator().manual_seed(0)
    pos, neg = torch.randn(60, 8, generator=g) + .7, torch.randn(60, 8, generator=g)
    for method, params in (("caa", {}), ("iti", {}), ("step-odesteer", {"n_components": 200}), ("mimic", {})):
        steerer = ods.make_steerer(method, **params).fit(pos, neg)
        T = time_at_angle(steerer, neg, 8.)
        cosine = torch.nn.functional.cosine_similarity(neg.double(), steerer.steer(neg, T=T).double(), dim=-1)
        assert cosine.clamp(-1, 1).acos().rad2deg().median().item() == pytest.approx(8., abs=.01)
    assert rotation(torch.tensor([[1., 0.]]), torch.tensor([[0., 2.]])).item() == pytest.approx(90) and rotation(torch.eye(2), torch.eye(2)).max() == 0
    tiny = torch.tensor([[1., 1e-6]], dtype=torch.float64)
    assert rotation(torch.tensor([[1., 0.]]), tiny).item() == pytest.approx(np.degrees(1e-6), rel=1e-6)  # where acos of a cosine sees nothing


def test_a_level_is_a_quantile_of_the_wanted():
    g = torch.Generator().manual_seed(1)
    pos, neg = torch.randn(80, 8, generator=g) + .5, torch.randn(80, 8, generator=g)
    steerer = ods.ODESteer(n_components=200).fit(pos, neg)
    at = resolve_strength({"level": .25, "share": .5}, steerer, pos, neg)
    assert at == {"until": pytest.approx(np.quantile(steerer.barrier.value(pos).numpy(), .25), rel=1e-4), "share": .5}
    with pytest.warns(UserWarning, match="could not reach"): stopped = steerer.steer(neg, **at)
    walked = steerer.steer(neg, share=.5)
    assert (stopped - neg).norm(dim=-1).median() < (walked - neg).norm(dim=-1).median()
    assert resolve_strength({"share": .3}, steerer, pos, neg) == {"share": .3}
    assert resolve_strength({"level": .25, "spread": 1.}, steerer, pos, neg) == {"until": at["until"], "spread": 1.} and resolve_strength({"spread": .3}, steerer, pos, neg) == {"spread": .3}
    assert [place(p) for p in ({"level": .1, "share": .6}, {"level": .1, "spread": 1.}, {"spread": 1.5}, {"T": 2.}, "best")] == ["level 0.1 within share 0.6", "level 0.1 within spread 1", "spread 1.5", "T 2", "best"]
