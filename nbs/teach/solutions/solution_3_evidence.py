"""Held-back checks of assignment 3, for `python -m tests.grade`.

A function is named after the answer that it is about; its parameters are names that the notebook defines."""
import inspect

import numpy as np
import torch
import odesteer as ods

r = np.random.default_rng(7)


def A1_order_does_not_matter(split):
    groups = [("fact", int(i)) for i in r.integers(0, 50, 400)]
    order = r.permutation(400)
    first = [{groups[i] for i in part} for part in split(groups, (.5, .25, .25), seed=3)]
    moved = [groups[i] for i in order]
    assert first == [{moved[i] for i in part} for part in split(moved, (.5, .25, .25), seed=3)], "rows in another order put questions elsewhere"

def A1_very_unequal_groups(split):
    groups = ["often"] * 300 + [f"once {i}" for i in range(39)]
    rows = split(groups, (.6, .2, .2), seed=1)
    kinds = [{groups[i] for i in part} for part in rows]
    assert sum("often" in part for part in kinds) == 1 and abs(len(kinds[0]) - 24) <= 1.5, "shares are of questions, not of rows"

def A1_leaves_the_global_generator_alone(split):
    before = np.random.get_state()[1].copy()
    assert split([1, 2, 3, 4, 5], (.6, .2, .2), seed=0) is not None, "no split"
    assert (np.random.get_state()[1] == before).all(), "numpy's global generator was used"


def A2_other_data(arms):
    g = torch.Generator().manual_seed(3)
    pos, neg = torch.randn(60, 10, generator=g) + .5, torch.randn(60, 10, generator=g)
    for spread in (.2, 1.):
        steerers, T = arms(pos, neg, [*range(60)] * 2, spread)
        for name, s in steerers.items():
            moved = (s.steer(neg, T=T[name]) - neg).norm(dim=-1).mean() / s.spread_
            assert abs(moved / spread - 1) < .08, f"{name} moves by {moved:.2f} spreads, asked for {spread}"

def A2_the_placebos_are_placebos(arms, pos, neg, texts):
    steerers, _ = arms(pos, neg, texts.pos_groups + texts.neg_groups, .5)
    assert type(steerers["random"]).__name__ == "RandomDirection" and type(steerers["shuffled"]).__name__ == "ShuffledLabels", "use the library's placebos"
    assert abs(torch.cosine_similarity(steerers["random"].vector_field(neg[0]), steerers["caa"].vector_field(neg[0]), dim=0)) < .4


def B1_by_fact(last_safe):
    groups = np.repeat(np.arange(12), 20)
    loss = np.where(groups < 1, -1., 0.)  # one fact of twelve loses everything: .083 in the mean
    assert last_safe([loss], groups, .15) == -1, "240 items about twelve facts are twelve"
    assert last_safe([loss], np.arange(240), .15) == 0, "the same items about 240 facts"

def B1_undefined_is_not_safe(last_safe):
    assert last_safe([np.zeros(50), np.full(50, np.nan), np.zeros(50)], np.arange(50), .1) == 0, "nothing left to measure is no safety"

def B1_all_safe(last_safe): assert last_safe([np.zeros(30)] * 4, np.arange(30), .05) == 3 and last_safe([np.ones(30)], np.arange(30), 0.) == 0, "nothing stops it"


def B2_uses_what_it_is_given(choose, asked, scores):
    "Asked for a steerer that breaks every sentence, and for one strength only"
    asked.clear()
    assert choose(ods.CAA().fit(torch.randn(20, 128, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 128) + .01*torch.arange(20)[:, None]), [.01]) == .01, "one safe strength is the choice"
    assert set(asked) == {"val"}, "a split other than val was asked"


def C1_paired_and_by_fact(compare):
    facts = np.repeat(np.arange(25), 8)
    plain = 5*r.normal(size=25)[facts]
    steered, placebo = plain + .3 + .2*r.normal(size=25)[facts], plain + .25*r.normal(size=25)[facts] + .4
    for mine, other in zip(compare(plain, steered, placebo, facts), (plain, placebo)):
        exact = ods.paired_difference(other, steered, facts)
        assert abs(mine.lo - exact.lo) < .05 and abs(mine.hi - exact.hi) < .05 and mine.groups == 25, "by fact, and item by item"


def C2_flips_whole_facts(p_values):
    facts = np.repeat(np.arange(6), 30)
    plain = np.zeros(180)
    p = p_values(plain, {"a": r.normal(size=6)[facts] + .4, "b": .1*r.normal(size=180)}, facts)
    assert p["a"] > .03, "six facts cannot give a p-value below about .03"

def C2_one_arm_is_not_adjusted(p_values):
    plain, x = np.zeros(40), r.normal(size=40) + .4
    p = p_values(plain, {"only": x}, np.arange(40))["only"]
    assert 0 < p <= 1 and len(p_values(plain, {"only": x, "other": -x}, np.arange(40))) == 2


def _plain(): return np.linspace(.2, .6, 60)

def D1_every_placebo_counts(verdicts):
    plain, noise = _plain(), .02*np.sin(np.arange(60))
    tried = {"m": plain + .2, "random": plain + noise, "shuffled": plain + .2 + noise}
    assert verdicts(plain, tried, ("random", "shuffled"), np.arange(60))["m"] == "not clear", "one of two placebos does as much"
    assert verdicts(plain, tried, ("random",), np.arange(60))["m"] == "better"

def D1_by_fact(verdicts):
    facts = np.repeat(np.arange(5), 40)
    plain = np.zeros(200)
    gain = np.array([.5, .4, -.3, .45, -.2])[facts]
    said = verdicts(plain, {"m": gain, "random": 1e-3*np.sin(np.arange(200))}, ("random",), facts)
    assert said["m"] == "not clear", "200 items about five facts"

def D1_worse_needs_no_placebo(verdicts):
    plain = _plain()
    said = verdicts(plain, {"m": plain - .1, "random": plain - .3}, ("random",), np.arange(60))
    assert said == {"m": "worse", "random": "worse"}, "above the placebo and below no steering is worse"

def D1_takes_any_placebos(verdicts):
    plain = _plain()
    assert verdicts(plain, {"m": plain + .1}, (), np.arange(60)) == {"m": "better"}, "without placebos no steering is all there is"
    assert len(inspect.signature(verdicts).parameters) == 4
