"What a plan costs: bounds that hold whatever the runs say, and nothing written"
from dataclasses import replace

import numpy as np
import pytest

import odesteer as ods
from odesteer.costs import Rehearsal, measure_pace, plan_cost, rehearse
from odesteer.runs import Run, run_key
from odesteer.sweeps import Plan, Search, run_plan

from .benches import bench, contents

UNIT = "truth",


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


class Dice(Rehearsal):
    "A bench whose answers are scored by dice: any course that a plan can take"
    def __init__(self, real, search, out, seed):
        self.dice = np.random.default_rng(seed)
        self.good, self.harm = self.dice.uniform(-.2, 1), self.dice.choice([0, .1, .3])
        super().__init__(real, search, True, out)
        self.search, self.asked, self.known = search, {}, {}

    def run(self, *args, beside=(), **kwargs):
        config = self.config(*args, **kwargs)
        key = run_key(config)
        self.asked[key] = config
        if key not in self.known:
            task, n, steered = self.task, 3, config["arm"] == "steer"
            x = [v for v in (config["strength"] or {}).values() if isinstance(v, float)]
            x = x[0] if x else 0.
            scores = {m: self.dice.normal(-task.better.get(m, 1) * self.harm * x * steered, .01, n) for m in (*task.watch, task.primary)}
            scores[task.primary] += task.better[task.primary] * self.good * np.sin(2*x) + self.dice.normal(0, .05)
            self.known[key] = Run(key, config, scores, list(range(n)), {})
        return self.known[key]

    def finished(self, *args, **kwargs): return run_key(self.config(*args, **kwargs)) in self.known

    def steerer(self, method, layer, params, fold=0):
        if layer is None and self.dice.random() < .05: raise ValueError("nothing to hold on to")

    def read_layers(self, layers): pass


def plans():
    every = [m for m in ods.REGISTRY]
    yield Plan([UNIT], every, Search([1, 2, 3], None, refine=2, repeats=2, seeds=2))
    yield Plan([UNIT], ["odesteer", "caa", "alqr"], Search([1, 2], (.15, .3, .6, 1.), refine=1, repeats=1, seeds=2), studies="all")
    yield Plan([UNIT], ["caa", "odesteer", "spid"], Search([2], (.2, .4), refine=2, repeats=3, seeds=1), studies=["closed loop", "multistep", "gains"])
    yield Plan([UNIT], ["iti", "spid"], Search([0, 1], (.3,), refine=1, repeats=2, seeds=3), studies=["steps", "metric"], curve=False)
    yield Plan([UNIT], ["caa", "alqr"], Search([1], rule="best", refine=0, repeats=1, seeds=[42, 43]))
    grid = {("micro-truth", "caa"): [{"T": 1}, {"T": 2}], ("micro-truth", "spid"): [{"T": .5}]}
    yield Plan([UNIT], ["caa", "spid"], Search([1, 2], grid, rule="best", refine=1, repeats=2, seeds=1))


@pytest.mark.parametrize("plan", list(plans()), ids=lambda p: f"{len(p.methods)} methods, {p.studies or 'no'} studies, {p.search.rule}")
def test_bounds_hold_whatever_the_runs_say(lm, tmp_path, plan):
    real = bench(lm, tmp_path/"real")
    least, most = (rehearse(plan, UNIT, real, which) for which in (False, True))
    assert not (tmp_path/"real").exists()
    found = []
    for seed in range(3 if len(plan.methods) > 9 or plan.studies == "all" else 8):
        dice = Dice(real, plan.search, tmp_path/str(seed), seed)
        run_plan(plan, lambda *_, **__: dice)
        found.append(len(dice.asked))
    assert len(least.wanted) <= min(found) <= max(found) <= len(most.wanted), (len(least.wanted), found, len(most.wanted))
    # and both are of use: the dearest course that the dice found is not far below the bound
    assert max(found) > .4 * len(most.wanted) and len(least.wanted) > 0


def test_counts_by_hand(lm, tmp_path):
    plan = Plan([UNIT], ["caa"], Search([1, 2], (.2, .4, .8), refine=1, repeats=2, seeds=3))
    least, most = (rehearse(plan, UNIT, bench(lm, tmp_path), which) for which in (False, True))
    assert len(least.wanted) == 1 + 2*3 + 2  # unsteered; on test unsteered and asked, three seeds; one strength in each layer
    assert len(most.wanted) == 2 + 2*3 + 2*3 + 3 + 2*2 + 3  # the second answers, two closer strengths with two answers, test
    best = replace(plan, search=replace(plan.search, rule="best", refine=0, repeats=1))
    assert [len(rehearse(best, UNIT, bench(lm, tmp_path), which).wanted) for which in (False, True)] == [1 + 6 + 6 + 3] * 2  # nothing can stop it


def test_a_real_plan_stays_within_and_what_is_done_is_not_paid_again(lm, tmp_path):
    plan = Plan([UNIT], ["caa", "random"], Search("ranked", (.2, .4), refine=1, repeats=1, seeds=1, allow=.5, readings=["last", "mean"], most=2), studies=["multistep"])
    make = lambda axis, out, **kwargs: bench(lm, out, axis=axis, **kwargs)
    real = bench(lm, tmp_path/"runs")
    before = plan_cost(plan, UNIT, real)
    assert before.least.texts == before.most.texts == 3 * sum(len(f.texts.pos + f.texts.neg) for f in real.task.folds)  # two readings are ranked, then the best places are read
    lo, hi = (len(r.wanted) for r in (before.least, before.most))
    run_plan(replace(plan, methods=["caa"], studies=()), make, tmp_path/"runs")
    partly = contents(tmp_path/"runs")
    half = plan_cost(plan, UNIT, real)
    assert half.there == len(partly) and len(half.most.wanted) < hi and contents(tmp_path/"runs") == partly
    run_plan(plan, make, tmp_path/"runs")
    made = len(contents(tmp_path/"runs"))
    assert lo <= made <= hi and len(half.least.wanted) <= made - len(partly) <= len(half.most.wanted)
    after = plan_cost(plan, UNIT, real)
    assert not after.most.wanted and after.seconds() == (0, 0) and "nothing is left to do" in str(after) and f"{made} runs" in str(after)
    # another folder, another model or another task has other runs
    assert plan_cost(plan, UNIT, bench(lm, tmp_path/"other")).there == 0 and plan_cost(plan, UNIT, bench(lm, tmp_path/"runs", axis="toxicity")).there == 0


def test_answers_tokens_and_seconds_are_those_of_the_runs(lm, tmp_path):
    plan = Plan([UNIT], ["caa"], Search([1], (.2, .4), refine=0, repeats=1, seeds=1))
    cost = plan_cost(plan, UNIT, bench(lm, tmp_path))
    task = cost.most.task
    n_val, n_test = (len(task.prompts(s)) for s in ("val", "test"))
    assert cost.answers() == (2*n_val + 2*n_test, 3*n_val + 3*n_test) and cost.tokens()[1] == cost.answers()[1] * task.decoding["max_new_tokens"]
    pace = cost.pace._replace(plain=1, steered=10, judged=100, read=1000, text=10_000)
    total = sum(len(f.texts.pos + f.texts.neg) for f in task.folds)
    effort = lambda n: min(n, 64) * 1000
    plain = n_val*101 + 2*n_test*101
    assert replace(cost, pace=pace).seconds() == (plain + n_val*110 + effort(n_val) + total*10_000, plain + 2*(n_val*110 + effort(n_val)) + n_test*(110 + 2000) + effort(n_test) + total*10_000)
    assert cost.runs() == {"unsteered": (2, 2), "asked in the prompt": (1, 1), "caa": (1, 3)}


def test_the_pace_grows_with_the_length_of_answers_and_names_a_judge_that_fails(lm, tmp_path):
    real = bench(lm, tmp_path)
    short, long = (measure_pace(bench_with(real, max_new_tokens=k)) for k in (4, 400))
    assert long.plain > 5 * short.plain and long.read > short.read and short.text > 0
    def judge(prompts, answers): raise OSError("no such model\non the hub")
    real.task = replace(real.task, judge=judge)
    assert (pace := measure_pace(real)).judged == 0 and pace.note == "the judge (no such model)"


def bench_with(real, **decoding):
    "The same bench with other lengths"
    import copy
    other = copy.copy(real)
    other.task = replace(real.task, decoding=real.task.decoding | decoding)
    return other
