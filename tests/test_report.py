"Reports of made-up studies whose answers are known: numbers by hand, merging, damage, verdicts, tables"
import csv
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.runs import resolve_strength, rotation, run_key, time_at_angle
from odesteer.sweeps import ABLATIONS, ablation_arms
from odesteer.results import find_runs, gather, guardrail_rows, make_units
from odesteer.report import Gain, Table, figures, main_table, report, tables, together, verdicts
from odesteer.statistics import bootstrap_interval

SPEC = {"primary": "reward", "better": {"reward": 1, "info": 1}, "watch": ["info"]}


class Study:
    "Run folders of one model; scores are given, or made of the luck of each question, an effect and noise"
    def __init__(self, out, model="toy 0", world="toy", groups=20, spec=SPEC):
        self.out, self.spec, self.about = Path(out), spec, {"name": model, "world": world, "sha256": model}
        self.groups = np.repeat(np.arange(groups), 2)
        self.luck = np.random.default_rng(len(model)).normal(size=groups).repeat(2)

    def held(self): return dict(task="toy", data={"sha256": "d"}, model=self.about)

    def run(self, arm="steer", method=None, params={}, layer=None, strength=None, split="test", seed=0, effect=0., noise=.1, scores=None, tps=100., answer="a", root=None, more={}):
        config = self.held() | dict(arm=arm, method=method, params=params, layer=layer, strength=strength, split=split, seed=seed, decoding={"top_p": .9}, batch_size=8)
        path = Path(root or self.out)/run_key(config)
        path.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(int(path.name, 16))
        if scores is None: scores = {"reward": self.luck + effect + noise*rng.normal(size=len(self.luck)), "info": np.ones(len(self.luck))}
        columns = {m: [None if np.isnan(v) else float(v) for v in x] for m, x in scores.items()}
        summary = {"n": len(self.groups), "means": {}, "tokens_per_second": tps, "seconds": 2., "task": self.spec} | ({"moved": .1, "angle": 5.} if method else {}) | more
        for name, value in dict(config=config, scores=columns, environment={"device": "cpu"}, summary=summary).items(): (path/f"{name}.json").write_text(json.dumps(value))
        items = (dict(i=i, fold=0, group=str(g), prompt=f"q{g}", answer=answer, tokens=3) for i, g in enumerate(self.groups))
        (path/"answers.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    def choice(self, method, params={}, layer=1, strength={"share": .4}, layers=(1, 2), root=None):
        config = self.held() | dict(method=method, params=params, layers=list(layers))
        path = Path(root or self.out)/"choices"/f"{run_key(config)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(config=config, layer=layer, strength=strength, why="stopped at 0.4: enough", trials=[])))
        return path

    def base(self, **kw):
        self.run("none", split="val")
        self.run("none", **kw)
        return self

    def method(self, method, effect, params={}, **kw):
        for share in (.2, .4): self.run("steer", method, params, 1, {"share": share}, "val", effect=effect*share/.4)
        self.choice(method, params)
        self.run("steer", method, params, 1, {"share": .4}, effect=effect, **kw)
        return self


def quick(folders, **kw): return gather(folders, **{"resamples": 199} | kw)


def row(results, arm, scope=0): return next(r for r in results["scopes"][scope]["rows"] if r["arm"] == arm)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    for k in range(2):
        s = Study(out, f"toy {k}").base()
        s.run("prompt", effect=.1)
        for m, e in {"caa": .3, "iti": .1, "odesteer": .6, "step-odesteer": .5, "random": 0.}.items(): s.method(m, e, tps=80.)
        s.choice("repe", layer=None, strength=None)
        for solver, effect in (("midpoint", .6), ("rk4", .3)):
            for share in (.2, .4): s.run("steer", "odesteer", {"solver": solver}, 1, {"share": share}, effect=effect)
        s.run("steer", "odesteer", {}, 1, {"share": .2}, effect=.6)
        for q in (.1, .9): s.run("steer", "odesteer", {}, 1, {"level": q, "share": .4}, effect=q/2)
    return out


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
    assert r["seeds"] == 2 and r["n"] == 6 and reward[0] == pytest.approx(items.mean(), abs=1e-4) and reward[3] == pytest.approx((items - before).mean(), abs=1e-4)
    assert reward[6] == pytest.approx(1/6, abs=1e-4)  # one item of six was made worse
    e = bootstrap_interval(items - before, s.groups, resamples=999)
    assert reward[4:6] == pytest.approx([e.lo, e.hi], abs=1e-4)
    assert r["metrics"]["info"][3] == pytest.approx(-1/6, abs=1e-4)
    assert r["win"][0] == pytest.approx((1 + 1 + .5 + .5 + 0 + 1 + .5 + .5 + 1 + .5 + 0) / 11, abs=1e-4)  # same seeds, ties one half, the undefined pair left out
    assert r["reward P90"][0] == 1


def test_interval_has_the_width_of_independent_questions(tmp_path):
    s = Study(tmp_path, groups=100).base().method("caa", .5)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=100).repeat(2), rng.normal(size=100).repeat(2)  # the two prompts of a question agree: 100 pieces of evidence, not 200
    for arm, x in (("none", a), ("steer", b)):
        s.run(arm, *(("caa", {}, 1, {"share": .4}) if arm == "steer" else ()), scores={"reward": x, "info": np.ones(200)})
    _, lo, hi = row(quick(tmp_path, resamples=1999), "caa")["metrics"]["reward"][3:6]
    assert hi - lo == pytest.approx(2*1.96*(b - a)[::2].std()/10, rel=.15)


def test_known_effects_are_found_and_pooled(results):
    pool, *parts = results["scopes"]
    assert [s["part"] for s in results["scopes"]] == [False, True, True] and pool["n"] == 80 and pool["groups"] == 40 and len(pool["models"]) == 2
    for arm, effect in {"caa": .3, "odesteer": .6, "random": 0., "prompt": .1}.items():
        d, lo, hi = row(results, arm)["metrics"]["reward"][3:6]
        assert lo - .02 <= effect <= hi + .02 and abs(d - effect) < .06
        both = [row(results, arm, k)["metrics"]["reward"] for k in (1, 2)]
        assert d == pytest.approx(np.mean([b[3] for b in both]), abs=1e-3) and hi - lo < max(b[5] - b[4] for b in both)
    assert row(results, "caa")["speed"] == [.8, .8, .8] and row(results, "caa")["chosen"] == [[1, {"share": .4}]]*2
    pairs = {tuple(p[:2]): p[2:] for p in pool["pairs"]}
    d, lo, hi, p, n = pairs["odesteer", "caa"]
    assert lo < .3 < hi and p < .05 and n == 80


def test_where_nothing_is_safe_steering_is_off(tmp_path, results):
    off = row(results, "repe")
    assert off["off"] == 2 and off["metrics"]["reward"][3:6] == [0, 0, 0]
    table = main_table(results["scopes"][0])
    assert table.rows[-1][0] == "repe" and table.rows[-1][-1] == "no safe strength" and table.rows[table.best][0] == "odesteer"
    for k in range(2):
        s = Study(tmp_path, f"toy {k}").base()
        if k: s.method("caa", 1.)
        else: s.choice("caa", layer=None, strength=None)
    r = quick(tmp_path)
    assert row(r, "caa")["metrics"]["reward"][3] == pytest.approx(row(r, "caa", 2)["metrics"]["reward"][3]/2, abs=1e-3)  # half of the items did not move
    assert "off in 1 of 2 models" in str(main_table(r["scopes"][0]).cells())


def test_a_report_where_nothing_was_safe(tmp_path):
    import matplotlib
    matplotlib.use("agg")
    s = Study(tmp_path/"runs").base()
    for method in ("odesteer", "step-odesteer", "caa", "random"):
        s.run("steer", method, {}, 2, {"share": .2}, "val")
        s.choice(method, layer=None, strength=None)
    r = report(tmp_path/"runs", tmp_path/"report", resamples=99)
    assert verdicts(r) == {"toy, toy": []} and r["scopes"][0]["curves"]["caa"]["chosen"][0][0] == .2  # where it was tried
    assert (tmp_path/"report"/"report.md").read_text().count("no safe strength") == 4
    assert {p.name for p in (tmp_path/"report"/"figures").iterdir()} == {"toy-toy-strength.png", "toy-toy-layers.png", "toy-toy-pareto.png"}


def test_a_report_without_validation_runs(tmp_path):
    s = Study(tmp_path/"runs")
    s.run("none")
    assert [r["arm"] for r in report(tmp_path/"runs", tmp_path/"report", resamples=99)["scopes"][0]["rows"]] == ["unsteered"]


def test_a_placebo_cannot_be_best(tmp_path):
    Study(tmp_path).base().method("random", .9).method("caa", .3)
    table = main_table(quick(tmp_path)["scopes"][0])
    assert table.rows[0][0] == "random (placebo)" and table.rows[table.best][0] == "caa"


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
    assert row(r, "caa")["speed"][0] == .9 and row(r, "iti")["speed"][0] == .5 and r["runs"]["repeated"] == 1
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
def test_damaged_runs_are_skipped_and_counted(tmp_path, name, text):
    s = Study(tmp_path).base().method("caa", .3)
    whole = quick(tmp_path)
    broken = s.run("steer", "iti", {}, 1, {"share": .4})
    (broken/name).unlink()
    if text is not None: (broken/name).write_text(text)
    after = quick(tmp_path)
    assert after["runs"] == whole["runs"] | {"damaged": 1} and after["scopes"] == whole["scopes"]


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
    assert [x["arm"] for x in r["scopes"][0]["rows"]] == ["unsteered", "odesteer (gamma=10.0)"] and row(r, "odesteer (gamma=10.0)")["chosen"] == [[2, {"share": .4}]]
    best = {arm: v[0] for arm, place, *v in r["scopes"][0]["studies"]["gamma and C"] if place == "best"}
    mean = Study(tmp_path).luck.mean()
    assert best == pytest.approx({"as configured": mean + .3, "gamma 0.1, C 1": mean + .1}, abs=.06)


def test_a_study_compares_its_arms_where_they_meet(results):
    rows = {tuple(r[:2]): r[2:] for r in results["scopes"][0]["studies"]["solver"]}
    assert {place for _, place in rows} == {"share 0.2", "share 0.4", "share (mean of 2)"}
    for arm in ("midpoint", "rk4"):
        mean = rows[arm, "share (mean of 2)"]
        assert mean[3] == pytest.approx(np.mean([rows[arm, f"share {s}"][3] for s in (.2, .4)]), abs=1e-3)
        assert mean[5] - mean[4] < rows[arm, "share 0.2"][5] - rows[arm, "share 0.2"][4]
    assert rows["rk4", "share (mean of 2)"][5] < 0 and rows["euler", "share 0.4"][3] is None
    levels = results["scopes"][0]["studies"]["stop level"]
    walked_on = rows["euler", "share 0.4"][0]
    assert len(levels) == 2 and all(v[0] - v[3] == pytest.approx(walked_on, abs=1e-3) for _, _, *v in levels)
    best = {arm: v for arm, place, *v in results["scopes"][0]["studies"]["multistep"] if place == "best"}
    assert best["one step"][3] == pytest.approx(-.1, abs=.05)


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("effect, noise, words", [(.5, .1, "No: many steps are better"), (-.5, .1, "Yes, and it is better than many"), (0., 1., "no clear difference")])
def test_verdicts_turn_with_the_sign_and_the_interval(tmp_path, way, effect, noise, words):
    s = Study(tmp_path, spec={**SPEC, "better": {"reward": way, "info": 1}}).base()
    s.method("step-odesteer", way*.2).method("odesteer", way*(.2 + effect), noise=noise)
    r = quick(tmp_path)
    said = {v.question: v for v in verdicts(r)["toy, toy"]}["Is one step enough?"]
    assert words in said.claim and "n=40" in said.evidence[0]
    d = row(r, "odesteer")["metrics"]["reward"][0] - row(r, "step-odesteer")["metrics"]["reward"][0]
    assert f"{way*d:+.3f}" in said.evidence[0] and (way*d > 0) == ("at chosen settings +" in said.evidence[0])


def test_all_verdicts(results):
    said = {v.question: str(v) for v in verdicts(results)["toy, toy (2 models)"]}
    assert "**Yes: odesteer is better than caa, iti**" in said["Is nonlinearity worth it?"]
    assert "**Yes: rk4 (at equal share (mean of 2)) is worse than euler**" in said["Does the solver matter?"]
    assert "no guardrail clearly worse" in said["What does it cost?"] and "speed x 0.80" in said["What does it cost?"]
    assert "**Yes, 4 of 4: caa, iti, odesteer, step-odesteer**" in said["Is any method better than every placebo?"]
    assert "3 of 4: caa, odesteer, step-odesteer" in said["Is any method better than asking in the prompt?"] and "Does the metric matter?" not in said


def test_a_placebo_without_safe_strength_is_no_steering(tmp_path):
    s = Study(tmp_path).base().method("caa", .5).method("iti", -.5)
    s.choice("random", layer=None, strength=None)
    said, = (v for v in verdicts(quick(tmp_path))["toy, toy"] if "placebo" in v.question)
    assert said.claim == "Yes, 1 of 2: caa; worse: iti (random had no safe strength and stands for no steering)"


def test_a_guardrail_that_falls_is_named(tmp_path):
    s = Study(tmp_path).base().method("caa", .5)
    s.run("steer", "caa", {}, 1, {"share": .4}, scores={"reward": s.luck + .5, "info": np.tile([0., 1.], 20)})
    assert "clearly worse info" in str(verdicts(quick(tmp_path))["toy, toy"][-1])


def test_many_tries_need_more_evidence():
    gains = {k: Gain(.1, .01, .2, .03, 50) for k in "abc"}
    assert {g.reading for g in gains.values()} == {"better than"}
    assert {g.reading for g in together(gains).values()} == {"no clear difference from"}
    assert Gain(.1, None, None, 1., 2).reading == "no clear difference from"
    assert (-Gain(.1, .01, .2, .03, 50)).reading == "worse than" and str(-Gain(.1, .01, .2, .03, 50)) == "-0.100 [-0.200, -0.010], n=50"


def test_tables_can_be_read_back(results):
    scope = results["scopes"][0]
    back = list(csv.DictReader(io.StringIO(main_table(scope).csv())))
    assert len(back) == len(scope["rows"])
    for line in back:
        r = row(results, line["arm"].replace(" (placebo)", ""))
        if r["arm"] == "repe": assert line["reward"] == "" and line["strength"] == "no safe strength"; continue
        assert [float(line[k]) for k in ("reward", "reward low", "reward high")] == r["metrics"]["reward"][:3]
        if r["arm"] != "unsteered": assert float(line["change of reward low"]) == r["metrics"]["reward"][4] and float(line["p (Holm)"]) == r["holm"]
    values = [float(line["reward"]) for line in back if line["reward"]]
    assert values == sorted(values, reverse=True)
    study = list(csv.DictReader(io.StringIO(tables(results)["toy, toy, solver"].csv())))
    assert {line["arm"] for line in study} == {"euler", "midpoint", "rk4"} and study[0]["change"] == "reference"


def test_less_is_better_sorts_the_other_way(tmp_path):
    Study(tmp_path, spec={**SPEC, "better": {"reward": -1, "info": 1}}).base().method("caa", -.5).method("iti", .5)
    assert [r[0] for r in main_table(quick(tmp_path)["scopes"][0]).rows] == ["caa", "unsteered", "iti"]


def test_markup_is_escaped():
    specials = "a_b & 50 % $x$ #1 {y} ~z ^w \\v <u> |t|"
    t = Table(specials, ["x_y", specials], [[specials, [1., .5, 1.5]], ["", None]], best=0, note=specials)
    tex = t.latex()
    body = tex.replace("\\textbackslash{}", "").replace("\\textasciitilde{}", "").replace("\\textasciicircum{}", "")
    for c in "_%$#": assert f"\\{c}" in body and c not in body.replace(f"\\{c}", "")
    assert "~" not in body and "^" not in body and len(re.findall(r"(?<!\\)&", tex)) == 3  # one separator in each of three rows
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(c, 0) for c in tex.replace("\\{", "").replace("\\}", "")))
    assert min(depth) == 0 == depth[-1]
    line = t.markdown().split("\n\n")[1].split("\n")[2]
    assert line.replace("\\|", "").count("|") == 3
    assert list(csv.reader(io.StringIO(t.csv())))[1] == [specials, "1.0", "0.5", "1.5"]


def test_results_survive_json_and_are_enough_for_the_report(results, tmp_path):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    again = json.loads(json.dumps(results, allow_nan=False))
    assert again == results
    report(again, tmp_path)
    assert json.loads((tmp_path/"results.json").read_text()) == results and not plt.get_fignums()
    text = (tmp_path/"report.md").read_text()
    pictures = {p.name for p in (tmp_path/"figures").iterdir()}
    assert {line.split("figures/")[1].rstrip(")") for line in text.split("\n") if line.startswith("![")} == pictures and len(pictures) == len(list(figures_of(results)))
    assert all(str(v) in text for said in verdicts(results).values() for v in said) and "stopped at 0.4: enough" in text
    assert {p.suffix for p in (tmp_path/"tables").iterdir()} == {".csv", ".tex"} and len(list((tmp_path/"tables").iterdir())) == 2*len(tables(results))


def figures_of(results):
    import matplotlib.pyplot as plt
    for name, figure in figures(results): plt.close(figure); yield name


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


# ---- guardrail tasks

def asked_tasks(out, scores, lm_eval={"tasks": "mmlu,arc"}, **arm):
    config = dict(model={"name": "toy 0", "sha256": "toy 0"}, lm_eval=lm_eval, **arm)
    (Path(out)/"guardrails").mkdir(parents=True, exist_ok=True)
    (Path(out)/"guardrails"/f"{run_key(config)}.json").write_text(json.dumps({"config": config, "scores": {t: {"metrics": {}, "items": {"acc": x}} for t, x in scores.items()}}))


def test_guardrail_tasks_stand_in_the_report(tmp_path):
    Study(tmp_path/"a").base().method("caa", .3)
    rng = np.random.default_rng(0)
    before, after = ({"mmlu_law": rng.integers(2, size=40).tolist(), "mmlu_art": rng.integers(2, size=20).tolist(), "arc": rng.integers(2, size=30).tolist()} for _ in range(2))
    for kept in (before, after): kept["mmlu"] = kept["mmlu_law"] + kept["mmlu_art"]
    asked_tasks(tmp_path/"a", before)
    asked_tasks(tmp_path/"b", after, method="caa", layer=1, strength={"share": .4})
    asked_tasks(tmp_path/"b", before)  # another machine asked the unsteered model too
    asked_tasks(tmp_path/"b", {"arc": [1]*5}, {"tasks": "arc", "limit": 5}, method="iti", layer=2, strength={"T": 1.})  # and nobody asked it like this
    (tmp_path/"b"/"guardrails"/"0.json").write_text("{")
    found = quick([tmp_path/"a", tmp_path/"b"])
    rows = {(r["method"], r["task"]): r for r in found["guardrails"]}
    assert set(rows) == {("unsteered", "mmlu"), ("unsteered", "arc"), ("caa", "mmlu"), ("caa", "arc"), ("iti", "arc")} and found["runs"]["damaged"] == 1
    for task in ("mmlu", "arc"):
        x, y = (np.array(k[task], float) for k in (before, after))
        e = bootstrap_interval(y - x)
        assert rows["caa", task]["score"] == pytest.approx(y.mean(), abs=1e-4) and rows["caa", task]["change"] == pytest.approx([e.value, e.lo, e.hi], abs=1e-3) and rows["caa", task]["n"] == len(x)
    assert rows["iti", "arc"]["change"] is None and rows["unsteered", "mmlu"]["change"] is None
    report(found, tmp_path/"r")
    table = tables(found)["guardrail tasks"]
    assert table.markdown() in (tmp_path/"r"/"report.md").read_text() and "| toy 0 | mmlu | acc | caa | 1 | share 0.4 |" in table.markdown()
    assert [(r["arm"], r["task"], r["questions"]) for r in csv.DictReader(open(tmp_path/"r"/"tables"/"guardrail-tasks.csv"))] == [(r["method"], r["task"], str(r["n"])) for r in found["guardrails"]]
    assert r"\toprule" in (tmp_path/"r"/"tables"/"guardrail-tasks.tex").read_text()
    assert guardrail_rows(tmp_path/"a") == [r for r in found["guardrails"] if r["method"] == "unsteered"]


# ---- controllers

def test_controllers_stand_beside_steerers_with_their_own_strengths_and_their_effort(tmp_path):
    s = Study(tmp_path/"runs").base().method("caa", .3, more={"effort": .05})
    for T in (1., 4.): s.run("steer", "alqr", {}, None, {"T": T}, "val", effect=T/10)
    s.choice("alqr", layer=None, strength={"T": 4.}, layers=(None,))
    for seed in range(3): s.run("steer", "alqr", {}, None, {"T": 4.}, effect=.4, seed=seed, more={"moved": None, "angle": None, "effort": .1 + .01*seed})
    found = quick(tmp_path/"runs")
    scope, = found["scopes"]
    table = main_table(scope)
    shown = {row[0]: dict(zip(table.columns, row)) for row in table.cells()}
    assert (shown["alqr"]["layer"], shown["alqr"]["strength"], shown["alqr"]["effort"]) == ("all", "T 4", "0.110") and (shown["caa"]["layer"], shown["caa"]["strength"], shown["caa"]["effort"]) == ("1", "0.4", "0.050")
    assert shown["unsteered"]["effort"] == "" and "effort" in table.note and "set-point" in table.note
    assert "effort" not in main_table(quick(Study(tmp_path/"old").base().method("caa", .3).out)["scopes"][0]).columns
    drawn = dict(figures(found))
    panels = {ax.get_title(loc="left"): ax for ax in drawn["toy, toy, strength"].axes}
    assert panels["alqr, set-point"].get_xlim()[1] > 4 and panels["caa"].get_xlim()[1] < 1 and "set-point" in drawn["toy, toy, strength"].get_supxlabel()
    assert [t.get_text() for t in drawn["toy, toy, layers"].axes[0].texts] == ["caa"]  # a controller has no layer to choose
    report(found, tmp_path/"r")
    assert "| alqr |" in (tmp_path/"r"/"report.md").read_text()
