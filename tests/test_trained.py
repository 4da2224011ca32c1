"The steerers whose field is a network: the loop that trains them, and what each must do where the answer is known"
import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import odesteer as ods
from odesteer import baselines
from odesteer.baselines import UNet, across, angle_between, draw_weights, fit_network, mlp, split_groups, td_loss

QUICK = {"hpr": dict(epochs=3), "recontrol": dict(epochs=5), "truthflow": dict(epochs=2)}
every = pytest.mark.parametrize("name", QUICK)


def gen(seed): return torch.Generator().manual_seed(seed)


def pairs_of(n=48, d=8, seed=0):
    "Unwanted activations and their wanted partners, some way off"
    neg = torch.randn(n, d, generator=gen(seed)) + 1
    return neg + 2 * torch.randn(d, generator=gen(seed + 1)) + .3 * torch.randn(n, d, generator=gen(seed + 2)), neg


# ---- the loop

class Number(nn.Module):
    "One weight; the loss -w makes AdamW raise it by lr at every step"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("share", [.1, .2, .5, .9])
def test_questions_are_never_split(share):
    for seed in range(20):
        groups = np.random.default_rng(seed).integers(0, 12, 60)
        rows, held = (r.numpy() for r in split_groups([f"question {i}" for i in groups], share, gen(seed)))
        assert sorted([*rows.tolist(), *held.tolist()]) == list(range(60)) and not set(groups[rows]) & set(groups[held])
        n = len(set(groups))
        assert len(set(groups[held])) == min(math.ceil(share * n), n - 1)


def test_with_one_question_or_no_share_nothing_is_held_out():
    for groups, share in ([7] * 5, .5), (range(5), 0.):
        rows, held = split_groups(groups, share, gen(0))
        assert rows.tolist() == list(range(5)) and len(held) == 0


def test_stops_after_patience_and_puts_the_best_weights_back():
    net = Number()
    history = fit_network(net, lambda rows, g: -net.w, range(10), lr=.1, epochs=100, batch_size=8, patience=4, judge=lambda rows, g: (net.w - 1).square())
    assert len(history["train"]) == len(history["held_out"]) == 14 and history["best"] == 9  # w = 1 after ten steps
    torch.testing.assert_close(net.w.detach(), torch.tensor(1.), rtol=0, atol=1e-4)
    assert min(history["held_out"]) == history["held_out"][9] and not net.training


@pytest.mark.parametrize("how", [dict(held_out=0), dict(patience=None)], ids=str)
def test_without_a_stop_all_epochs_are_run(how):
    net = Number()
    history = fit_network(net, lambda rows, g: -net.w, range(10), lr=.1, epochs=30, batch_size=10, judge=lambda rows, g: (net.w - 1).square(), **how)
    assert len(history["train"]) == 30
    torch.testing.assert_close(net.w.detach(), torch.tensor(1. if "patience" in how else 3.), rtol=0, atol=1e-4)


def test_only_training_rows_are_trained_on_and_each_once_an_epoch():
    seen, judged, net = [], [], Number()
    def loss(rows, g): (seen if torch.is_grad_enabled() else judged).append(rows.tolist()); return net.w.square() + 1
    fit_network(net, loss, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], epochs=2, batch_size=3, patience=None)
    trained, held = sorted(sum(seen[:3], [])), sorted(judged[0])
    assert len(seen) == 6 and sorted(sum(seen[3:], [])) == trained and sorted(judged[1]) == held
    assert sorted(trained + held) == list(range(10)) and len(held) == 2 and held[0] // 2 == held[1] // 2
    assert sum(seen[:3], []) != sum(seen[3:], [])  # another order


def test_held_out_rows_see_the_same_draws_in_every_epoch():
    draws, net = [], Number()
    def loss(rows, g):
        if not torch.is_grad_enabled(): draws.append(torch.rand(3, generator=g))
        return net.w + torch.rand(1, generator=g).sum()
    fit_network(net, loss, range(10), epochs=3, batch_size=8)
    assert len(draws) == 3 and torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_the_schedule_scales_the_learning_rate():
    asked, net = [], Number()
    def schedule(step, steps): asked.append((step, steps)); return float(step == 1)
    fit_network(net, lambda rows, g: -net.w, range(8), lr=.5, epochs=3, batch_size=4, held_out=0, schedule=schedule)
    assert asked == [(i, 6) for i in range(6)]
    torch.testing.assert_close(net.w.detach(), torch.tensor(.5), rtol=1e-4, atol=0)


def test_a_loss_that_is_no_number_is_an_error():
    net = Number()
    with pytest.raises(ValueError, match="training diverged .loss nan.: use a smaller lr"): fit_network(net, lambda rows, g: net.w * torch.nan, range(10))
    with pytest.raises(ValueError, match="1 of 2 rows left to train on"): fit_network(net, lambda rows, g: net.w, range(2))


def test_first_weights_are_those_that_pytorch_draws():
    with torch.device("meta"): net = nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200))
    before = torch.get_rng_state()
    draw_weights(net, 0, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before) and net[0].weight.dtype == torch.float64
    for p in net[0].weight, net[0].bias:
        assert p.abs().max() <= .1 and abs(p.mean()) < .01 and p.std().item() == pytest.approx(.2 / math.sqrt(12), rel=.1)
    assert (net[1].weight == 1).all() and (net[1].running_var == 1).all() and (net[1].running_mean == 0).all()
    with torch.device("meta"): again = nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200))
    assert torch.equal(draw_weights(again, 0, torch.zeros(1)).double()[0].weight, net[0].weight)


# ---- what all three promise

@every
def test_card_keeps_the_curves_and_loading_does_not_train(name, tmp_path, monkeypatch):
    pos, neg = pairs_of()
    s = ods.make_steerer(name, **QUICK[name]).fit(pos, neg)
    assert len(s.chosen["train"]) == len(s.chosen["held_out"]) == QUICK[name]["epochs"] and s.chosen["best"] in range(QUICK[name]["epochs"])
    s.save_pretrained(tmp_path)
    monkeypatch.setattr(baselines, "fit_network", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(baselines, "draw_weights", lambda *a, **k: pytest.fail("drew weights"))
    again = ods.load_steerer(tmp_path)
    assert torch.equal(again.steer(neg, T=.7), s.steer(neg, T=.7)) and again.card == s.card
    assert not any(p.requires_grad for m in (s, again) for p in m.parameters()) and not any(m.training for m in again.modules() if isinstance(m, nn.BatchNorm1d))


@every
def test_questions_reach_the_split(name, monkeypatch):
    pos, neg = pairs_of()
    seen = []
    monkeypatch.setattr(baselines, "split_groups", lambda groups, share, g: seen.append((list(groups), share)) or split_groups(groups, share, g))
    ids = [f"q{i // 4}" for i in range(48)]
    ods.make_steerer(name, held_out=.3, **QUICK[name]).fit(pos, neg, groups=ids * 2)
    assert seen == [(ids * 2 if name == "recontrol" else ids, .3)]
    if name == "recontrol": return
    rows = [(i, (i + 1) % 48) for i in range(0, 48, 3)]
    ods.make_steerer(name, **QUICK[name]).fit(pos, neg, groups=ids * 2, pairs=rows)
    assert seen[-1][0] == [ids[i] for i, _ in rows]


@every
def test_pairs_are_asked_for_only_where_they_are_needed(name):
    pos, neg = pairs_of()
    s = ods.make_steerer(name, **QUICK[name])
    if name == "recontrol": s.fit(pos, neg[:30]); return
    with pytest.raises(ValueError, match=re.escape("48 positives and 30 negatives: pass pairs=")): s.fit(pos, neg[:30])
    with_pairs = ods.make_steerer(name, **QUICK[name]).fit(pos, neg[:30], pairs=[[i, i] for i in range(30)])
    torch.testing.assert_close(with_pairs.steer(neg, T=1.), s.fit(pos[:30], neg[:30]).steer(neg, T=1.))


@every
@pytest.mark.parametrize("bad", [dict(epochs=0), dict(epochs=2.5), dict(epochs=None), dict(batch_size=2), dict(batch_size=True), dict(patience=0), dict(lr=0), dict(lr=-1e-3),
                                 dict(lr=float("inf")), dict(held_out=1), dict(held_out=-.1)], ids=str)
def test_bad_settings(name, bad):
    (key, value), = bad.items()
    with pytest.raises(ValueError, match=f"{key} (must|is).*got {value!r}"): ods.make_steerer(name, **bad)


@every
def test_can_be_fitted_where_gradients_are_off(name):
    pos, neg = pairs_of()
    s = ods.make_steerer(name, **QUICK[name]).fit(pos, neg)
    with torch.no_grad(): quiet = ods.make_steerer(name, **QUICK[name]).fit(pos, neg)
    with torch.inference_mode(): inside = ods.make_steerer(name, **QUICK[name]).fit(pos.clone(), neg.clone())
    for other in quiet, inside: assert torch.equal(other.steer(neg, T=1.), s.steer(neg, T=1.))
    x = neg.clone().requires_grad_()
    inside.steer(x, T=.5).sum().backward()
    assert torch.isfinite(x.grad).all()


@every
def test_activations_of_another_size_are_learned_as_well(name):
    pos, neg = pairs_of()
    s, big = ods.make_steerer(name, **QUICK[name]).fit(pos, neg), ods.make_steerer(name, **QUICK[name]).fit(64 * pos, 64 * neg)
    if name == "recontrol": torch.testing.assert_close(big.barrier.value(64 * neg), s.barrier.value(neg))
    else: torch.testing.assert_close(big.steer(64 * neg, T=1.), 64 * s.steer(neg, T=1.), rtol=1e-5, atol=1e-4)


@every
def test_progress_is_silent_when_nobody_watches(name, capsys):
    ods.make_steerer(name, **QUICK[name]).fit(*pairs_of())
    assert capsys.readouterr() == ("", "")


# ---- HPR

def published_hpr(a, p, theta):
    "Eq. of the paper with the reflector as a matrix"
    reflector = torch.eye(len(p), dtype=p.dtype) - 2 * torch.outer(p, p) / (p @ p)
    image = a @ reflector
    g2 = torch.acos((a * image).sum(-1) / a.square().sum(-1))
    return (theta.sin() / g2.sin())[:, None] * image + ((g2 - theta).sin() / g2.sin())[:, None] * a


@pytest.fixture(scope="module")
def hpr():
    neg = torch.randn(200, 8, generator=gen(0)) + torch.tensor([-2., 0, 0, 0, 0, 0, 0, 0])
    pos = torch.randn(200, 8, generator=gen(1)) + torch.tensor([2., 1, 0, 0, 0, 0, 0, 0])
    return ods.HPR(epochs=10).fit(pos, neg)


def test_hpr_is_the_published_rotation(hpr):
    a = 3 * torch.randn(300, 8, generator=gen(2), dtype=torch.float64)
    me = copy.deepcopy(hpr).double()
    theta, p = math.pi * me.angle(a).sigmoid(), me.coef_
    wrong = (a @ p).sigmoid().round() == 0
    assert 50 < wrong.sum() < 250
    out = hpr.steer(a, T=1.)
    torch.testing.assert_close(out[wrong], published_hpr(a[wrong], p, theta[wrong]), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[~wrong], a[~wrong]) and torch.equal(hpr.steer(a), out)
    torch.testing.assert_close(hpr.steer(a, T=.4)[wrong], published_hpr(a[wrong], p, .4 * theta[wrong]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_hpr_keeps_norms_at_every_strength(hpr, dtype, tol):
    a = (10 ** torch.linspace(-6, 6, 400, dtype=dtype))[:, None] * torch.randn(400, 8, generator=gen(3)).to(dtype)
    for T in (-7.3, -1, .01, .5, 1, 2, 50):
        torch.testing.assert_close(hpr.steer(a, T=T).norm(dim=-1), a.norm(dim=-1), rtol=tol, atol=0)
    moved = (hpr.steer(a, T=1.) != a).any(-1)
    theta = hpr._on(a)._theta(a)
    torch.testing.assert_close(angle_between(a, hpr.steer(a, T=.3))[moved].double(), .3 * theta[moved].double(), rtol=1e-3, atol=1e-5)


def test_hpr_at_the_places_where_the_published_formula_divides_by_zero(hpr):
    p = hpr.coef_.double()
    u = across(torch.ones(8, dtype=torch.float64), p)
    u = u - (u @ p) / (p @ p) * p  # on the mirror
    for a in (-2 * p, -p * (1 + 1e-9), u - 1e-9 * p, torch.zeros(8, dtype=torch.float64)):
        out, theta = hpr.steer(a, T=1.), math.pi * copy.deepcopy(hpr).double().angle(a).sigmoid()
        assert torch.isfinite(out).all() and torch.isfinite(hpr.vector_field(a)).all()
        torch.testing.assert_close(out.norm(), a.norm(), rtol=1e-12, atol=0)
        if a.any(): torch.testing.assert_close(angle_between(a, out), theta, rtol=1e-6, atol=0)
    eps = u - 1e-9 * p  # continuous up to the mirror: towards p
    torch.testing.assert_close(hpr.vector_field(eps) @ p / hpr.vector_field(eps).norm(), p.norm(), rtol=1e-6, atol=0)


def test_quarter_turns():
    a, p = torch.randn(50, 6, generator=gen(4), dtype=torch.float64), torch.randn(6, generator=gen(5), dtype=torch.float64)
    w = across(a, p)
    torch.testing.assert_close((w * a).sum(-1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(w.norm(dim=-1), a.norm(dim=-1))
    assert (w @ p > 0).all() and (torch.linalg.svdvals(torch.stack([a, w, p.expand_as(a)], 1))[:, 2] < 1e-12).all()  # one plane


def test_angles():
    x = torch.tensor([1., 0.], dtype=torch.float64)
    for angle in 0., 1e-9, .3, math.pi / 2, math.pi - 1e-9, math.pi:
        assert angle_between(5 * x, .1 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)).item() == pytest.approx(angle, rel=1e-6, abs=1e-12)


def test_hpr_learns_a_rotation():
    "Unwanted activations in a sector of the plane, wanted ones the same turned by 0.9: the pair is found again"
    def polar(r, phi): return torch.stack([r * phi.cos(), r * phi.sin()], -1)
    def turned(n, seed):
        r, phi = 1 + 2 * torch.rand(n, generator=gen(seed)), .6 * torch.rand(n, generator=gen(seed + 1)) - .3
        return polar(r, phi + .9), polar(r, phi)
    s = ods.HPR(lr=3e-3, epochs=60).fit(*turned(300, 10))
    pos, neg = turned(200, 20)
    assert (s._unwanted(neg).float().mean() > .97) and (s._unwanted(pos).float().mean() < .03)
    theta = s._theta(neg)[s._unwanted(neg)]
    assert abs(theta.mean() - .9) < .05 and theta.std() < .1
    miss = (s.steer(neg, T=1.) - pos).norm(dim=-1) / pos.norm(dim=-1)
    assert miss.median() < .06 and miss.quantile(.9) < .15


def test_hpr_drops_pairs_that_are_mostly_equal():
    pos, neg = pairs_of()
    same = neg[:9].clone()
    same[:, :2] += 5  # six of eight entries agree
    s, plain = ods.HPR(epochs=3).fit(torch.cat([pos, same]), torch.cat([neg, neg[:9]])), ods.HPR(epochs=3).fit(pos, neg)
    assert torch.equal(s.coef_, plain.coef_) and torch.equal(s.steer(neg, T=1.), plain.steer(neg, T=1.))
    with pytest.raises(ValueError, match="in every pair the wanted and the unwanted activation agree in most entries"): ods.HPR().fit(same, neg[:9])


# ---- RE-Control

def test_temporal_differences_by_hand():
    "Two answers, of three tokens and one: the last token is told the reward, the others the detached value of the next"
    X, w = torch.randn(4, 3, generator=gen(0), dtype=torch.float64), torch.tensor([.5, -1., 2.], dtype=torch.float64, requires_grad=True)
    reward, after = torch.tensor([3., 3., 3., -1.], dtype=torch.float64), torch.tensor([1, 2, -1, -1])
    V = (X @ w).detach()
    errors = (X @ w) - torch.stack([V[1], V[2], reward[2], reward[3]])
    for rows in [0, 1, 2, 3], [2], [0, 3], [1, 0]:
        loss = td_loss(lambda a: a @ w, X, reward, after, torch.tensor(rows))
        torch.testing.assert_close(loss, errors[rows].square().mean())
        got, = torch.autograd.grad(loss, w)
        torch.testing.assert_close(got, (2 * errors[rows, None] * X[rows]).mean(0).detach())


def test_tokens_are_told_apart():
    "What td_loss is given, for answers of different lengths"
    d, (pos, neg) = 8, pairs_of(2)
    seqs = [torch.randn(n, d, generator=gen(n)) for n in (3, 1, 2, 4)]
    data = ods.euler.contrast(pos, neg, groups=["a", "b", "a", "c"], sequences=[seqs[0], seqs[1].numpy(), seqs[2].double(), seqs[3].tolist()], rewards=[1, 2, 3, 4])
    X, reward, after, groups = baselines._tokens(data)
    torch.testing.assert_close(X, torch.cat(seqs))
    assert reward.tolist() == [1, 1, 1, 2, 3, 3, 4, 4, 4, 4] and after.tolist() == [1, 2, -1, -1, 5, -1, 7, 8, 9, -1]
    assert list(groups) == ["a"] * 3 + ["b"] + ["a"] * 2 + ["c"] * 4
    data.groups = None
    assert list(baselines._tokens(data)[3]) == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]


def test_the_reward_travels_back_to_the_token_that_earned_it():
    side = torch.arange(60) % 2 * 2. - 1
    answers = .3 * torch.randn(60, 8, 2, generator=gen(0))
    answers[:, 3:, 0] += 1.5 * side[:, None]
    s = ods.REControl(lr=1e-2, batch_size=96, epochs=200, patience=30).fit(answers[side > 0, -1], answers[side < 0, -1], sequences=list(answers), rewards=10 + 5 * side)
    value = s.barrier.score(answers)
    assert len(s.chosen["train"]) > 20  # a flat value has small temporal differences: they must not end the training
    assert ((value[:, 3:].mean(1) - 10) * side > 3).all() and abs(value[:, :3].mean() - 10) < 1.5


@pytest.fixture(scope="module")
def recontrol():
    neg = torch.randn(300, 6, generator=gen(0))
    return ods.REControl(lr=3e-3, eta=.3, steps=7).fit(torch.randn(300, 6, generator=gen(1)) + torch.tensor([2., 0, 0, 0, 0, 0]), neg)


def test_recontrol_is_gradient_ascent(recontrol):
    a = torch.randn(40, 6, generator=gen(2), dtype=torch.float64)
    net = copy.deepcopy(recontrol.barrier.score).double()
    def ascend(a, eta):
        for _ in range(7):
            x = a.clone().requires_grad_()
            a = a + eta * torch.autograd.grad(net(x).sum(), x)[0]
        return a
    torch.testing.assert_close(recontrol.steer(a, T=1.), ascend(a, .3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(recontrol.steer(a), ascend(a, .3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(recontrol.steer(a, T=2.5), ascend(a, .75), rtol=1e-9, atol=1e-9)
    x = a.clone().requires_grad_()
    torch.testing.assert_close(recontrol.vector_field(a), 7 * .3 * torch.autograd.grad(net(x).sum(), x)[0])


def test_recontrol_from_labels_tells_them_apart_and_raises_the_value(recontrol):
    neg, pos = torch.randn(200, 6, generator=gen(3)), torch.randn(200, 6, generator=gen(4)) + torch.tensor([2., 0, 0, 0, 0, 0])
    V = recontrol.barrier.score
    assert abs(V(pos).mean() - .75) < .15 and abs(V(neg).mean() - .25) < .15  # clouds that overlap: the mean label is the best guess
    assert (V(pos)[:, None] > V(neg)).float().mean() > .85  # at best 0.92
    path = ods.integrate(recontrol._field, neg, 3., 60, path=True)
    assert ods.certificate(recontrol.barrier, path, tol=1e-3).share_monotone > .97 and (V(path[-1]) > V(neg)).all() and (V(path[-1]) - V(neg)).mean() > .3


def test_the_value_is_a_barrier(recontrol):
    a = torch.randn(30, 6, generator=gen(5))
    assert ods.implied_barrier(recontrol) is recontrol.barrier
    torch.testing.assert_close(recontrol.barrier.value(a), recontrol.barrier.score(a) - .5)
    twin = copy.deepcopy(recontrol).double()
    for p in twin.barrier.score.parameters(): p.mul_(2)  # barrier and field stay one network, in a copy too
    torch.testing.assert_close(twin.vector_field(a.double()), 7 * .3 * twin.barrier.grad(a.double()))
    assert not torch.allclose(twin.vector_field(a), recontrol.vector_field(a))
    climber = ods.ODESteer(barrier=recontrol.barrier).fit(a + 1, a)
    out = climber.stop_at(a, until=.1)
    assert out.reached.float().mean() > .9 and (recontrol.barrier.value(out.a[out.reached]) > .1 - 1e-4).all()
    for level in dict(until=.1), dict(nats=1.):
        with pytest.raises(ValueError, match="has no barrier to stop at: use T= or spread=, or ODESteer.barrier=steerer.barrier."): recontrol.steer(a, **level)


BAD_SEQUENCES = {
    "no rewards": (lambda s: (s, None), "48 sequences need rewards=, one number each; got None"),
    "too few rewards": (lambda s: (s, torch.ones(3)), "48 sequences need rewards=, one number each; got (3,)"),
    "another width": (lambda s: ([*s[:5], s[5][:, :3], *s[6:]], torch.arange(48.)), "sequences[5] must be finite activations of shape (n_tokens, 8), at least one token; got (4, 3)"),
    "no tokens": (lambda s: ([s[0][:0], *s[1:]], torch.arange(48.)), "sequences[0] must be finite"),
    "one vector": (lambda s: ([s[0][0], *s[1:]], torch.arange(48.)), "sequences[0] must be finite"),
    "a NaN": (lambda s: ([*s[:-1], s[-1] * torch.nan], torch.arange(48.)), "sequences[47] must be finite"),
    "equal rewards": (lambda s: (s, torch.ones(48)), "all rewards are 1: there is nothing to climb"),
}


@pytest.mark.parametrize("bad", BAD_SEQUENCES)
def test_bad_sequences(bad):
    change, message = BAD_SEQUENCES[bad]
    sequences, rewards = change([torch.randn(4, 8, generator=gen(i)) for i in range(48)])
    with pytest.raises(ValueError, match=re.escape(message)): ods.REControl(epochs=1).fit(*pairs_of(), sequences=sequences, rewards=rewards)


@pytest.mark.parametrize("bad", [dict(eta=0), dict(steps=0), dict(steps=1.5)], ids=str)
def test_bad_recontrol(bad):
    with pytest.raises(ValueError, match="must be"): ods.REControl(**bad)


# ---- TruthFlow

@pytest.fixture(scope="module")
def truthflow():
    pos, neg = pairs_of(96, 12)
    return ods.TruthFlow(epochs=8, lr=2e-3, batch_size=16, alpha=1., k=12).fit(pos, neg)


def test_truthflow_learns_a_constant_displacement():
    neg, shift = torch.randn(400, 8, generator=gen(0)), 3 * torch.randn(8, generator=gen(1))
    s = ods.TruthFlow(lr=5e-3, epochs=60, batch_size=64).fit(neg + shift, neg)
    fresh = torch.randn(100, 8, generator=gen(2))
    moved = s.steer(fresh, T=1.) - fresh
    assert (moved.mean(0) / 1.5 - shift).norm() / shift.norm() < .08 and ((moved / 1.5 - shift).norm(dim=-1) / shift.norm()).median() < .25
    torch.testing.assert_close(s.steer(fresh, T=.4), fresh + .4 * moved, rtol=1e-4, atol=1e-4)
    assert s.basis_.shape == (8, 8)  # 20 directions are kept, where there are so many


def test_truthflow_corrects_along_the_main_directions_only():
    pos, neg = pairs_of(96, 12)
    whole, flat = (ods.TruthFlow(epochs=3, k=k, alpha=1.).fit(pos, neg) for k in (12, 3))
    V = np.linalg.svd((pos - neg).double().numpy(), full_matrices=False)[2][:3]
    c, c3 = (s.vector_field(neg.double()) for s in (whole, flat))
    torch.testing.assert_close(c3, torch.from_numpy(c.numpy() @ V.T @ V), rtol=1e-4, atol=1e-4)
    assert (torch.linalg.svdvals(c3)[3:] < 1e-6 * torch.linalg.svdvals(c3)[0]).all() and torch.linalg.matrix_rank(c) > 3


def velocity(s):
    "The trained velocity in the units of the activations, as a function of time and state, and float64"
    me = copy.deepcopy(s).double()
    return lambda t, x: me.scale_ * me.net(x / me.scale_, torch.full_like(x[..., :1], float(t)))


def test_truthflow_follows_the_flow_to_its_end(truthflow):
    from scipy.integrate import solve_ivp
    u, x = velocity(truthflow), torch.randn(12, generator=gen(3), dtype=torch.float64)
    end = solve_ivp(lambda t, y: u(t, torch.from_numpy(y)[None])[0].numpy(), (0, 1), x.numpy(), rtol=1e-6, atol=1e-6).y[:, -1]
    fine = copy.deepcopy(truthflow)
    fine.steps = 200
    torch.testing.assert_close(fine.vector_field(x), torch.from_numpy(end), rtol=1e-3, atol=1e-3)
    assert (truthflow.vector_field(x) - torch.from_numpy(end)).norm() < .1 * np.linalg.norm(end)


def test_truthflow_takes_the_published_grid(truthflow):
    from torchdiffeq import odeint
    u, x = velocity(truthflow), torch.randn(9, 12, generator=gen(4), dtype=torch.float64)
    end = odeint(u, x, torch.linspace(0, 1, 16, dtype=torch.float64), method="midpoint")[-1]
    torch.testing.assert_close(truthflow.vector_field(x), end, rtol=1e-5, atol=1e-5)  # float32 directions
    torch.testing.assert_close(truthflow.steer(x), x + end, rtol=1e-5, atol=1e-5)


def test_truthflow_starts_from_the_unwanted_activation_or_from_the_source():
    pos, neg = pairs_of()
    plain, given = ods.TruthFlow(epochs=2).fit(pos, neg), ods.TruthFlow(epochs=2).fit(pos, neg, source=neg)
    assert torch.equal(plain.steer(neg, T=1.), given.steer(neg, T=1.))
    other = ods.TruthFlow(epochs=2).fit(pos, neg, source=neg.flip(0))
    assert not torch.allclose(plain.steer(neg, T=1.), other.steer(neg, T=1.))
    with pytest.raises(ValueError, match="source must hold one state per pair: 48 pairs, 30 states"): ods.TruthFlow().fit(pos, neg, source=neg[:30])
    with pytest.raises(ValueError, match="source has width 5, the activations 8"): ods.TruthFlow().fit(pos, neg, source=neg[:, :5])


def test_one_correction_for_a_query(truthflow):
    tokens, state = torch.randn(6, 12, generator=gen(5)), torch.randn(12, generator=gen(6))
    c = truthflow.vector_field(state)
    torch.testing.assert_close(truthflow.steer(tokens, T=.6, source=state), tokens + .6 * c)
    torch.testing.assert_close(truthflow.steer(tokens, source=state), tokens + c)
    assert torch.equal(truthflow.steer(tokens, T=.6, source=tokens), truthflow.steer(tokens, T=.6)) and torch.equal(truthflow.steer(tokens, T=0, source=state), tokens)
    assert not torch.allclose(truthflow.steer(tokens) - tokens, c.expand(6, 12), atol=1e-2)  # of its own for each token
    T = torch.tensor([0., 1, 2, -1, .5, 1])
    torch.testing.assert_close(truthflow.steer(tokens.bfloat16(), T=T, source=state.bfloat16()).float(), (tokens.bfloat16().float() + T[:, None] * truthflow.vector_field(state.bfloat16().float())).bfloat16().float())
    torch.testing.assert_close(truthflow.steer(tokens, spread=.8, source=state), tokens + .8 * truthflow.spread_ / truthflow.displacement_ * c)
    torch.testing.assert_close(truthflow.steer(tokens, share=.3, source=state), tokens + .3 * truthflow.median_norm_ / truthflow.displacement_ * c)
    with pytest.raises(ValueError, match="was fitted on activations of width 12"): truthflow.steer(tokens, source=tokens[0, :5])
    with pytest.raises(ValueError, match="has no barrier to stop at"): truthflow.steer(tokens, until=0., source=state)


@pytest.mark.parametrize("d, widths", [(2, [2, 16, 16, 16, 16]), (128, [128, 64, 32, 16, 16]), (2304, [2304, 1152, 576, 288, 144])])
def test_the_u_net_halves_its_width(d, widths):
    with torch.device("meta"): net = UNet(d)
    assert [b.skip.in_features - 128 for b in net.down] + [net.down[-1].skip.out_features] == widths
    assert [b.skip.out_features for b in net.up] == widths[-2::-1]
    assert [b.skip.in_features - 128 for b in net.up] == [i + o for i, o in zip(widths[:0:-1], widths[-2::-1])]
    assert net(torch.empty(5, d, device="meta"), torch.empty(5, 1, device="meta")).shape == (5, d)


@pytest.mark.parametrize("n", [3, 4, 137, 138])
def test_few_pairs_and_odd_batches(n):
    pos, neg = pairs_of(n)
    assert torch.isfinite(ods.TruthFlow(epochs=2).fit(pos, neg).steer(neg, T=1.)).all()
    with pytest.raises(ValueError, match="a flow cannot be trained on 2 pairs: give at least 3"): ods.TruthFlow().fit(pos[:2], neg[:2])


def test_networks_of_one_output():
    net = mlp([3, 16, 1], nn.ReLU)
    assert net(torch.ones(3)).shape == () and net(torch.ones(2, 5, 3)).shape == (2, 5) and len(net) == 3
