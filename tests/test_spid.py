"PID controllers, barrier-driven feedback and effort against independent computations"
import math

import numpy as np
import pytest
import torch
from scipy import optimize

import odesteer as ods
from odesteer.barrier import LinearBarrier
from odesteer.control import EffortMeter, Recorder, Rollouts, Tracker, _Pass, effort, newton_climb
from odesteer.euler import Edit
from odesteer.linear import Jacobians, block_inputs, riccati
from odesteer.hooks import generate_text
from odesteer.models import decoder_layers

from .archs import LAYERS, WIDTH, tiny_model, tiny_tokenizer
from .test_controllers import IDS, LEFT, NEG, POS, fit, logits, steered, the_model

TOK, SILENT = tiny_tokenizer(), dict(progress=False)


def rollouts(L=25, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Rollouts(torch.randn(L + 1, 9, d, generator=g, dtype=torch.float64) + torch.randn(L + 1, 1, d, generator=g, dtype=torch.float64), torch.randn(L + 1, 7, d, generator=g, dtype=torch.float64), None)


def features(data, setpoint):
    "Directions, lengths and offsets in NumPy"
    pos, neg = data.pos.numpy().mean(1)[:-1], data.neg.numpy().mean(1)[:-1]
    mu = np.linalg.norm(pos - neg, axis=1)
    V = (pos - neg) / mu[:, None]
    return V, mu, (V * neg).sum(1) if setpoint == "centred" else 0 * mu


# ---- S-PID

@pytest.mark.parametrize("setpoint", ["uncentred", "centred"])
@pytest.mark.parametrize("every", [1, 4, 10, 100])
def test_spid_is_the_formula(setpoint, every):
    "Against a loop over layers and rows in NumPy, with blocks that turn and bend"
    data, kp, ki, kd = rollouts(), .4, .15, .25
    c = ods.SPID(kp, ki, kd, every, setpoint)
    c._fit(data)
    V, mu, offset = features(data, setpoint)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    x0, value, state = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.tensor([.5, 1., 2.], dtype=torch.float64), {}
    for _ in range(2):  # the second pass must not know of the first
        x, ours = x0, []
        for t in range(25):
            y = torch.tanh(x @ turn)
            ours.append(c._control(t, x, y, value, state))
            x = y + ours[-1]
        for row in range(3):
            x, e, integral = x0[row].numpy(), [], np.zeros(6)
            for t in range(25):
                e.append((offset[t] + value[row].item() * mu[t] - V[t] @ x) * V[t])
                integral = np.zeros(6) if t % every == 0 else integral + e[t]
                u = kp * e[t] + ki * integral + kd * (e[t] - e[max(t - 1, 0)])
                np.testing.assert_allclose(ours[t][row].numpy(), u, rtol=1e-10, atol=1e-12)
                x = np.tanh(x @ turn.numpy()) + u
    assert state == {}


@pytest.mark.parametrize("every", [1, 4, 10, 100])
def test_spid_the_short_way_and_both_ways_in_turn(every):
    "Gains multiplied into the directions, at every block or at some, against the formula"
    data, value = rollouts(), torch.tensor(1.5, dtype=torch.float64)
    c = ods.SPID(.4, .15, .25, every)
    c._fit(data)
    c.width = 6
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    def walk(short):
        x, here, ends = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), _Pass(), []
        for rows in 3, 3, 2, 3:  # as many tokens as in the pass before, fewer, more
            x = torch.cat([x, x])[:rows]
            for t in range(25):
                y = torch.tanh(x @ turn)
                x = c._looped(t, here, value)(x[:, None], y[:, None])[:, 0] if short(t) else y + c._control(t, x, y, value.expand(rows), here.state)
            ends.append(x)
            assert here.state == {}
        return torch.cat(ends)
    want = walk(lambda t: False)
    for short in (lambda t: True), (lambda t: t < 13), (lambda t: t >= 13), (lambda t: t % 3 > 0), (lambda t: t == 0), (lambda t: t % 7 < 5):
        torch.testing.assert_close(walk(short), want, rtol=1e-10, atol=1e-12)


def test_a_pass_that_broke_off_leaves_nothing_behind():
    "Pass after pass: in inference mode and out of it, whole or not, of as many tokens or fewer"
    data, value = rollouts(), torch.tensor(1.5, dtype=torch.float64)
    c, x = ods.SPID(), torch.randn(3, 1, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    c._fit(data)
    c.width, here = 6, _Pass()
    acts = [c._looped(t, here, value) for t in range(25)]
    def walk(x, until=25):
        for act in acts[:until]: x = act(x, x)
        return x
    with torch.inference_mode(): want = walk(x)
    with torch.no_grad():
        walk(x + 1, until=7)
        assert here.state and torch.equal(walk(x), want) and here.state == {}
        walk(x + 1, until=7)
        assert torch.equal(walk(x[:2]), want[:2])


def test_the_integral_is_zero_where_it_is_reset():
    data, x = rollouts(), torch.ones(1, 6, dtype=torch.float64)
    c, state, pushes = ods.SPID(kp=0., ki=1., kd=0.), {}, []
    c._fit(data)
    for t in range(25): pushes.append(c._control(t, x, x, torch.tensor(1.), state).norm().item())
    assert [t for t, u in enumerate(pushes) if u == 0] == [0, 10, 20]


def test_no_derivative_kick_at_block_0():
    data, x = rollouts(), torch.ones(2, 6, dtype=torch.float64)
    c, state = ods.SPID(kp=0., ki=0., kd=1.), {}
    c._fit(data)
    u = [c._control(t, (1 + t) * x, x, torch.tensor(1.), state) for t in (0, 1)]
    assert (u[0] == 0).all() and (u[1] != 0).any()


def test_at_the_set_point_nothing_changes_bit_for_bit():
    c = fit("spid")
    edits = c.edits(the_model(), None, 0.)
    x, y = torch.zeros(3, WIDTH), torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    y[0, 0] = -0.
    for t in range(LAYERS): assert torch.equal(edits[t](x, y, torch.zeros(())).view(torch.int32), y.view(torch.int32))
    quick = [edits[t].prepare(torch.zeros(())) for t in range(LAYERS)]
    for z in y, -torch.zeros_like(y), -torch.zeros_like(y[:1]):
        for act in quick: assert torch.equal(act(x[:len(z), None], z[:, None])[:, 0].view(torch.int32), z.view(torch.int32))


@pytest.mark.parametrize("setpoint", ["uncentred", "centred"])
def test_without_i_and_d_it_is_actadd_lfs_everywhere(setpoint):
    pid, p = fit("spid", kp=.6, ki=0., kd=0., setpoint=setpoint), fit("actadd-lfs", kp=.6, layers=range(LAYERS), setpoint=setpoint)
    assert torch.equal(steered(pid), steered(p)) and torch.equal(steered(pid, mask=LEFT, positions="all"), steered(p, mask=LEFT, positions="all"))


def test_every_token_starts_afresh():
    "In generation each token's corrections are those of a pass of its own, by an own hook on every block"
    model, c, ids = the_model(), fit("spid", kp=.3, ki=.2, kd=.2, reset_every=2), IDS[:1]
    with ods.steering(model, c, strength=1.): ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    n, token = ids.shape[1], ids
    def hook(t, module, args, kwargs, y):
        x = (args[0] if args else kwargs["hidden_states"])[0].double()
        y = y.clone()
        for j in range(n - 1, x.shape[0]):
            e = (c.mu_[t] - x[j] @ c.V_[t].double()) * c.V_[t].double()
            before, total = memory.get((j, t - 1), (e, 0 * e))
            total = 0 * e if t % 2 == 0 else total + e
            memory[j, t] = e, total
            y[0, j] += (.3 * e + .2 * total + .2 * (e - before)).float()
        return y
    hooks = [b.register_forward_hook(lambda *a, t=t: hook(t, *a), with_kwargs=True) for t, b in enumerate(decoder_layers(model))]
    for _ in range(6):
        memory = {}
        token = torch.cat([token, logits(model, token)[:, -1:].argmax(-1)], 1)
    for h in hooks: h.remove()
    assert torch.equal(token, ours)


# ---- ActAdd-LFS

def test_default_block():
    data = rollouts(L=12)
    c = ods.ActAddLFS(); c._fit(data)
    assert c.chosen == {"layers": [5]} and fit("actadd-lfs").chosen == {"layers": [2]}
    c = ods.ActAddLFS(layers=[-1, 3, 3]); c._fit(data)
    assert c.chosen == {"layers": [3, 11]} and ods.ActAddLFS(layers=(1, 2)).params["layers"] == [1, 2]
    for wrong in [], [12], [True], ["1"]:
        with pytest.raises(ValueError, match="layers must be some of the blocks 0 to 11"): ods.ActAddLFS(layers=wrong)._fit(data)


@pytest.mark.parametrize("strength", [0., 1., 2.5])
def test_full_gain_reaches_the_set_point_of_a_block_that_passes_on(strength):
    "If block t gave back its input, kp = 1 would put the feature exactly on its set-point, and move nothing else"
    c = fit("actadd-lfs", layers=[1])
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, V = c.edits(the_model(dtype=torch.float64), None, strength)[1](x, x, torch.tensor(strength)), c.V_[1].double()
    torch.testing.assert_close(out @ V, (strength * c.mu_[1].double()).expand(5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((out - x) - ((out - x) @ V)[:, None] * V, torch.zeros_like(x), rtol=0, atol=1e-6)


# ---- PID-AcT

def test_pid_act_is_fitted_block_by_block():
    "By own hooks, one block after the other: the mean output for wanted texts minus that for unwanted ones, pushed so far"
    model, kp, ki, kd = the_model(), .8, .3, .2
    c = fit("pid-act", kp=kp, ki=ki, kd=kd)
    def mean_output(texts, m, pushes):
        out = []
        for text in texts:
            ids = torch.tensor([TOK(text)["input_ids"]])
            def hook(t, module, args, y):
                y = y.clone()
                if t < len(pushes): y[0, -1] += pushes[t].float()
                if t == m: out.append(y[0, -1].double())
                return y
            hooks = [b.register_forward_hook(lambda *a, t=t: hook(t, *a)) for t, b in enumerate(decoder_layers(model))]
            logits(model, ids)
            for h in hooks: h.remove()
        return torch.stack(out).mean(0)
    pushes, r = [], []
    for m in range(LAYERS):
        r.append(mean_output(POS, m, []) - mean_output(NEG, m, pushes))
        pushes.append(kp * r[m] + ki * sum(r[:m], torch.zeros(WIDTH)) + kd * (r[m] - r[max(m - 1, 0)]))
    torch.testing.assert_close(c.errors_.double(), torch.stack(r), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(c.push_.double(), torch.stack(pushes), rtol=1e-4, atol=1e-4)


def test_pid_act_adds_its_pushes():
    c, x, y = fit("pid-act"), torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    strength = torch.tensor([0., 1., -2.])
    for t, edit in c.edits(the_model(), None, strength).items(): torch.testing.assert_close(edit(x, y, strength), y + strength[:, None] * c.push_[t])
    assert torch.equal(steered(c, strength=0.), logits(the_model()))


def test_answers_are_pushed_from_the_prompt_on_while_fitting():
    "With pairs, tokens before the prompt's last stay as they are, as in generation"
    pairs = [(p[:2], p[2:]) for p in POS if len(p) > 3], [(n[:2], n[2:]) for n in NEG if len(n) > 3]
    c = ods.PIDAcT(ki=0., kd=0.).fit(the_model(), TOK, *pairs, **SILENT)
    with ods.steering(the_model(), c, strength=1.): steered_states = block_inputs(the_model(), TOK, pairs[1])
    reached, wanted = steered_states[1:].mean(1), block_inputs(the_model(), TOK, pairs[0])[1:].mean(1)
    torch.testing.assert_close(reached, wanted, rtol=1e-3, atol=1e-3)  # kp = 1 closes the gap at every block


# ---- barriers

class Ball(ods.Barrier):
    "h = 4 - |a - c|^2, whose way to a level is known"
    def __init__(self, c): super().__init__(); self.c = c
    def value(self, a): return 4 - (a - self.c).square().sum(-1)


def test_newton_climb_by_hand():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(7, generator=g, dtype=torch.float64), torch.randn(20, 7, generator=g, dtype=torch.float64)
    h = LinearBarrier(w, .3)
    level, below = torch.tensor(.5, dtype=torch.float64), (h.value(x) < .5)[:, None]
    nearest = x + (.5 - h.value(x))[:, None] * w / w.square().sum()  # the closest point of a plane
    torch.testing.assert_close(newton_climb(h, x, level, 1), torch.where(below, nearest, x))
    assert torch.equal(newton_climb(h, x, level, 5)[~below[:, 0]], x[~below[:, 0]]) and below.any() and not below.all()
    rows = torch.linspace(-2, 2, 20, dtype=torch.float64)
    torch.testing.assert_close(h.value(newton_climb(h, x, rows, 1)), torch.maximum(rows, h.value(x)))


def test_newton_climb_on_a_ball_and_on_a_leash():
    x, c = 5 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    h, r = Ball(c), (x - c).norm(dim=1)
    out = newton_climb(h, x, torch.tensor(3.), 8)
    torch.testing.assert_close((out - c).norm(dim=1), r.clamp_max(1.), rtol=1e-6, atol=1e-6)  # level 3 is the sphere of radius 1
    torch.testing.assert_close(torch.cosine_similarity(out - c, x - c), torch.ones(30).double())
    short = newton_climb(h, x, torch.tensor(3.), 8, .7)
    torch.testing.assert_close((short - x).norm(dim=1), (r - 1).clamp(0, .7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steep", [0., 1e-300, 1e-40, 1e-25, 1e-19, 1e-17, 1e-9, 1., 1e15])
def test_newton_climb_never_leaves_its_leash_however_flat(dtype, steep):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    w = torch.full((6,), steep / 6**.5, dtype=dtype)
    way = newton_climb(LinearBarrier(w, 0.), x, torch.tensor(2., dtype=dtype), 3, .7) - x
    assert way.isfinite().all() and (way.norm(dim=1) <= .7001).all() and (way >= 0).all()
    if steep >= 100 * torch.finfo(dtype).tiny**.5: torch.testing.assert_close(way.norm(dim=1), ((2. - x @ w) / steep).clamp(0, .7), rtol=1e-4, atol=1e-5)
    if not steep: assert not way.any() and torch.equal(newton_climb(LinearBarrier(w, 0.), x, torch.tensor(1e4, dtype=dtype)), x)  # no leash, and far below


@pytest.fixture(scope="module")
def guard(): return fit("barrier-lqr", jacobian="identity", q=2., r=1., qf=3., n_components=128, n_texts=None)


def test_levels_are_medians_of_each_blocks_barrier(guard):
    for texts, level in (NEG, guard.low_), (POS, guard.high_):
        x = block_inputs(the_model(), TOK, texts)
        for t, part in enumerate(guard.parts):
            again = ods.ODESteer(n_components=128).fit(block_inputs(the_model(), TOK, POS)[t], block_inputs(the_model(), TOK, NEG)[t]).barrier
            assert torch.allclose(again.value(x[t]), part.barrier.value(x[t]), rtol=1e-5, atol=1e-6) and level[t].item() == pytest.approx(again.value(x[t]).median().item(), rel=1e-5, abs=1e-6)
    assert (guard.high_ > guard.low_ + .1).all()


def test_scalar_gains_are_those_of_the_recursion(guard):
    s, gains = 3., []
    for _ in range(LAYERS): k = s / (s + 1.); s = 2. + k; gains.append(k)
    torch.testing.assert_close(guard.K_.flatten(), torch.tensor(gains[::-1]))
    dense = fit("barrier-lqr", q=2., r=1., qf=3., n_components=128, n_jacobian=3)
    for t, K in enumerate(riccati(Jacobians(the_model(), TOK, dense._draw(POS, "", "n_jacobian"), progress=False), 2., 1., 3.)): torch.testing.assert_close(dense.K_[t], K, rtol=1e-3, atol=1e-4)


def test_corrections_stop_at_the_level(guard):
    "Undone gains give the way to the level: SciPy finds where the ray of the first gradient meets it"
    x = block_inputs(the_model(), TOK, NEG)[2]
    h, level = guard.parts[2].barrier, guard.high_[2]
    for strength in (0., .5, 1.):
        goal = (guard.low_[2] + strength * (level - guard.low_[2]))
        way = (guard.edits(the_model(), None, strength)[2](x, x, torch.tensor(strength)) - x) / guard.K_[2].flatten()
        done = h.value(x) >= goal
        assert (way[done] == 0).all() and (way[~done] != 0).any(1).all()
        reached, free = h.value(x + way), way.norm(dim=1) < guard.leash_[2] * .999
        torch.testing.assert_close(reached[free & ~done], goal.expand(int((free & ~done).sum())), rtol=0, atol=.05 * (guard.high_ - guard.low_)[2].item())
        assert (reached[~done] > h.value(x)[~done]).all() and (way.norm(dim=1) <= guard.leash_[2] * 1.0001).all()
    i = int(h.value(x).argmin())
    u = h.grad(x[i:i + 1])[0]
    u = u / u.norm()
    s = optimize.brentq(lambda s: float(h.value(x[i] + s * u)) - float(guard.low_[2]), 0., float(guard.leash_[2]) * 4)
    assert abs(newton_climb(h, x[i:i + 1], guard.low_[2], 5).sub(x[i]).norm().item() / s - 1) < .2


@pytest.mark.parametrize("jacobian", ["identity", "mean"])
@pytest.mark.parametrize("n,width,rotates", [(128, WIDTH, True), (12, WIDTH, False), (128, 1025, False)])  # few buckets: of low rank
def test_corrections_beside_newtons_method_with_autograd(jacobian, n, width, rotates):
    c = fit("barrier-lqr", jacobian=jacobian, n_components=n, n_jacobian=3)._on(torch.zeros(0, dtype=torch.float64))
    x, c.width = block_inputs(the_model(), TOK, NEG)[2].double(), width  # a width from which on it would not pay
    b, goal, a, left = c.parts[2].barrier, c.low_[2] + .7 * (c.high_[2] - c.low_[2]), x.clone(), c.leash_[2].expand(len(x))
    for _ in range(3):
        a.requires_grad_()
        h = b.value(a)
        g, = torch.autograd.grad(h.sum(), a)
        length = torch.minimum((goal - h.detach()).clamp_min(0) / g.norm(dim=1), left)
        a, left = a.detach() + length[:, None] * g / g.norm(dim=1, keepdim=True), left - length
    K = c.K_[2].expand(WIDTH, WIDTH) * torch.eye(WIDTH) if jacobian == "identity" else c.K_[2]
    u = c._control(2, x, x, torch.tensor(.7, dtype=torch.float64), {})
    torch.testing.assert_close(u, (a - x) @ K.T, rtol=1e-9, atol=1e-11)
    assert u.any() and (u == 0).all(1).any() and (c._diagonal(2, x)[0] is not b) == rotates
    c._store(K_=2 * c.K_)  # other gains
    torch.testing.assert_close(c._control(2, x, x, torch.tensor(.7, dtype=torch.float64), {}), 2 * u)


def test_blocks_that_see_no_difference_have_no_say():
    "All texts end in the same token, so nothing is known before block 0"
    end = lambda texts: [t + "." for t in texts]
    c = ods.BarrierLQR(n_components=64, jacobian="identity").fit(the_model(), TOK, end(POS), end(NEG), **SILENT)
    assert (c.K_[0] == 0).all() and (c.K_[1:] > 0).any()
    x = torch.randn(4, WIDTH)
    assert torch.equal(c.edits(the_model(), None, 3.)[0](x, x, torch.tensor(3.)), x)


# ---- Recorder and effort

class Everything:
    "A controller with known corrections"
    def __init__(self, layers=range(LAYERS)): self.layers = layers
    def edits(self, model, layer, strength): return {t: Edit(lambda x, y, value, t=t: (y.float() + value[..., None] * (t + 1) * torch.tanh(x.float())).to(y.dtype)) for t in self.layers}


def test_a_recorder_sees_what_hooks_see_and_changes_nothing():
    rec, plain = Recorder(Everything()), steered(Everything())
    seen = {}
    def note(t, module, args, kwargs, y): seen[t] = (args[0] if args else kwargs["hidden_states"])[:, -1], y[:, -1]
    with ods.steering(the_model(), rec, strength=1.5):
        hooks = [b.register_forward_hook(lambda *a, t=t: note(t, *a), with_kwargs=True) for t, b in enumerate(decoder_layers(the_model()))]
        assert torch.equal(logits(the_model()), plain)
        for h in hooks: h.remove()
    for t, ((x, y, moved),) in rec.seen.items():
        assert torch.equal(x, seen[t][0]) and torch.equal(moved, seen[t][1])
        torch.testing.assert_close(moved - y, 1.5 * (t + 1) * torch.tanh(x))
    assert sorted(rec.seen) == list(range(LAYERS))


def test_a_recorder_stands_for_what_it_wraps():
    c = fit("spid")
    rec = Recorder(c)
    assert (rec.unit, rec.width, rec.about) == (c.unit, c.width, c.about) and torch.equal(steered(rec), steered(c))
    with pytest.raises(ValueError, match="is a number"): steered(rec, strength=dict(share=.3))
    with pytest.raises(ValueError, match="leave out layer="): steered(Recorder(c), layer=1)
    with pytest.raises(AttributeError): rec.nonsense
    tracker = Tracker().fit(the_model(), TOK, "the quick brown", progress=False)  # whose edits remember
    assert all(isinstance(edit, Edit) and edit.remember is not None for edit in Recorder(tracker).edits(the_model(), None, 1.).values())
    assert torch.equal(steered(Recorder(tracker)), steered(tracker))
    caa = ods.CAA().fit(torch.ones(3, WIDTH), torch.zeros(3, WIDTH))
    assert torch.equal(steered(Recorder(caa), layer=1), steered(caa, layer=1))


def brute_effort(model, part, texts, **kw):
    "Shares by hooks around the edits, text by text; tokens from the prompt's last one on"
    shares = {t: [] for t in range(LAYERS)}
    for prompt, answer in texts:
        q, ids = len(TOK(prompt)["input_ids"]), torch.tensor([TOK(prompt)["input_ids"] + TOK(answer, add_special_tokens=False)["input_ids"]])
        before, after = {}, {}
        blocks = decoder_layers(model)
        with ods.steering(model, part, positions=torch.tensor([q]), **kw):
            hooks = [b.register_forward_hook(lambda m, a, y, t=t: before.setdefault(t, y.clone()) * 1, prepend=True) for t, b in enumerate(blocks)]
            hooks += [b.register_forward_hook(lambda m, a, y, t=t: after.setdefault(t, y.clone()) * 1) for t, b in enumerate(blocks)]
            logits(model, ids)
        for h in hooks: h.remove()
        for t in shares: shares[t] += ((after[t] - before[t])[0, q - 1:].double().norm(dim=1) / after[t][0, q - 1:].double().norm(dim=1)).tolist()
    return [float(np.mean(s)) for s in shares.values()], len(shares[0])


@pytest.mark.parametrize("layers", [range(LAYERS), [1, 3]], ids=str)
def test_effort_is_the_mean_share_over_blocks_and_tokens(layers):
    prompts, answers = ["ab", "hello you", "q", "zz"], [" yes.", "no", "", "maybe so, or not."]
    part = Everything(layers)
    found = effort(the_model(), TOK, prompts, part, strength=.7, answers=answers)
    by_hand, tokens = brute_effort(the_model(), part, list(zip(prompts, answers)), strength=.7)
    np.testing.assert_allclose(found["per_layer"], by_hand, rtol=1e-4)
    assert math.isclose(found["effort"], np.mean(by_hand), rel_tol=1e-4) and found["tokens"] == tokens
    assert [t for t, x in enumerate(found["per_layer"]) if x] == list(layers)


def test_effort_of_single_layers_several_layers_and_its_own_answers():
    caa, prompts = ods.CAA().fit(2 * torch.ones(3, WIDTH), torch.ones(3, WIDTH)), ["ab", "hello you"]
    one = effort(the_model(), TOK, prompts, caa, strength=2., layer=-1, max_new_tokens=5, do_sample=False)
    with ods.steering(the_model(), caa, layer=-1, strength=2.): answers = generate_text(the_model(), TOK, prompts, max_new_tokens=5, do_sample=False)
    assert one == effort(the_model(), TOK, prompts, caa, strength=2., layer=LAYERS - 1, answers=answers) and one["per_layer"][:-1] == [0.] * (LAYERS - 1)
    assert one["per_layer"][-1] > 0 and math.isclose(one["effort"], one["per_layer"][-1] / LAYERS)
    assert effort(the_model(), TOK, prompts, {LAYERS - 1: caa}, strength=2., answers=answers) == one
    two = effort(the_model(), TOK, prompts, {0: caa, 2: caa}, strength=dict(share=.3), answers=answers)
    assert [t for t, x in enumerate(two["per_layer"]) if x] == [0, 2]
    assert effort(the_model(), TOK, prompts, caa, strength=0., layer=1, answers=answers)["effort"] == 0


def test_effort_with_several_answers_per_prompt_rows_and_bad_counts():
    c, prompts = fit("spid"), ["ab", "hello you"]
    twice = effort(the_model(), TOK, prompts, c, strength=1., answers=["x", "yes.", "n", "no."])
    by_hand, tokens = brute_effort(the_model(), c, [("ab", "x"), ("ab", "yes."), ("hello you", "n"), ("hello you", "no.")], strength=1.)
    np.testing.assert_allclose(twice["per_layer"], by_hand, rtol=1e-3, atol=1e-6)
    assert twice["tokens"] == tokens
    rows = effort(the_model(), TOK, prompts, c, strength=torch.tensor([0., 2.]), answers=["yes.", "no."])
    parts = [effort(the_model(), TOK, [p], c, strength=s, answers=[a]) for p, s, a in zip(prompts, (0., 2.), ("yes.", "no."))]
    assert math.isclose(rows["effort"], sum(p["effort"] * p["tokens"] for p in parts) / rows["tokens"], rel_tol=1e-4)
    with pytest.raises(ValueError, match="2 prompts but 3 answers"): effort(the_model(), TOK, prompts, c, answers=["a", "b", "c"])


def test_the_meter_adds_up_and_compiles():
    c, model = fit("spid"), tiny_model("llama")
    meter = EffortMeter(c)
    with ods.steering(model, meter, strength=1.5): logits(model), logits(model, IDS[:1])
    rec = Recorder(c)
    with ods.steering(model, rec, strength=1.5): logits(model), logits(model, IDS[:1])
    shares = [torch.cat([(m - y).norm(dim=1) / m.norm(dim=1) for _, y, m in rec.seen[t]]) for t in range(LAYERS)]
    np.testing.assert_allclose(meter.read(LAYERS)["per_layer"], [s.mean().item() for s in shares], rtol=1e-5)
    assert meter.read(LAYERS)["tokens"] == 4 and meter.read(2 * LAYERS)["effort"] == pytest.approx(meter.read(LAYERS)["effort"] / 2)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    again = EffortMeter(c)
    with ods.steering(model, again, strength=1.5) as h:
        for strength in (1.5, 3., 1.5): h.strength = strength; logits(model)
    with ods.steering(the_model(), (plain := EffortMeter(c)), strength=1.5) as h:
        for strength in (1.5, 3., 1.5): h.strength = strength; logits(the_model())
    np.testing.assert_allclose(again.read(LAYERS)["per_layer"], plain.read(LAYERS)["per_layer"], rtol=1e-4)
    assert again.read(LAYERS)["tokens"] == 9


def test_barrier_gains_of_another_width():
    with pytest.raises(ValueError, match="Jacobians have width 8, but the states have"):
        ods.BarrierLQR(n_components=64).fit(the_model(), TOK, POS, NEG, jacobians=[torch.eye(8)] * 4, **SILENT)
