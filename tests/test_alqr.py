"A-LQR and its relatives: fast forms against dense gains, exactly linear blocks through the real hook, what is moved and what is not"
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import odesteer as ods
from odesteer.control import ALQR, FeatureLQR, Tracker
from odesteer.linear import Jacobians, block_inputs, riccati
from odesteer.hooks import generate_text
from odesteer.models import decoder_layers

from .archs import LAYERS, WIDTH, tiny_model
from .test_controllers import IDS, LEFT, NEG, POS, TOK, logits, outputs, sentences, the_model

GREEDY = dict(max_new_tokens=4, do_sample=False)
ONE = torch.ones(())


class Linear(nn.Module):
    "A block that is exactly linear, token by token"
    def __init__(self, A): super().__init__(); self.A = nn.Parameter(A)
    def forward(self, hidden_states, *args, **kwargs): return hidden_states @ self.A.T


@pytest.fixture(scope="module")
def linear():
    "A llama whose blocks are replaced by linear ones, in float64"
    model, g = tiny_model("llama").double(), torch.Generator().manual_seed(7)
    for t in range(LAYERS): model.model.layers[t] = Linear(torch.eye(WIDTH).double() + .3 * torch.randn(WIDTH, WIDTH, generator=g, dtype=torch.float64) / WIDTH**.5)
    return model


@pytest.fixture(scope="module")
def jacobians(): return torch.stack(list(Jacobians(the_model(), TOK, POS[:6], progress=False)))


@pytest.fixture(scope="module")
def llama(jacobians):
    def fit(cls=ALQR, *weights, pos=POS, neg=NEG, also=(), **kw): return cls(*weights, **kw).fit(the_model(), TOK, pos, neg, also=also, jacobians=jacobians, progress=False)
    return fit


def matrices(model): return torch.stack([block.A.detach() for block in decoder_layers(model)])
def fit_linear(model, cls=ALQR, *weights, also=(), **kw): return cls(*weights, **kw).fit(model, TOK, POS, NEG, also=also, jacobians=matrices(model), progress=False)
def rows(n=5, seed=0): return 3 * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_numpy(A, E, q, r, qf):
    "K_t E_t^T from the textbook recursion, float64, explicit inverse; nothing of the library"
    A, E = np.asarray(A, np.float64), np.asarray(E, np.float64)
    S, out = qf * np.eye(A.shape[-1]), []
    for A_t, E_t in zip(A[::-1], E[::-1]):
        K = np.linalg.inv(S + r * np.eye(len(S))) @ S @ A_t
        S = q * np.eye(len(S)) + A_t.T @ S @ A_t - (S @ A_t).T @ K
        out.append(E_t @ K.T)
    return torch.tensor(np.stack(out[::-1])).float()


# ---- the tables

@pytest.mark.parametrize("weights", [(.1, 1., .1), (.1, 10., 10.), (10., 10., 1.)], ids=str)
@pytest.mark.parametrize("setpoint", ["uncentred", "centred"])
def test_tables_from_an_independent_recursion(llama, jacobians, weights, setpoint):
    c = llama(ALQR, *weights, setpoint=setpoint)
    pos, neg = (block_inputs(the_model(), TOK, texts).double().numpy().mean(1) for texts in (POS, NEG))
    mu = np.linalg.norm(pos - neg, axis=1)
    v = (pos - neg) / mu[:, None]
    np.testing.assert_allclose(c.mu_, mu[:-1], rtol=1e-5)
    np.testing.assert_allclose(c.V_, v[:-1], atol=1e-6)
    np.testing.assert_allclose(c.W_, by_numpy(jacobians, v[:-1], *weights), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(c.offset_, (v * neg).sum(1)[:-1] * (setpoint == "centred"), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(c.natural_, (v * pos).sum(1)[:-1] / mu[:-1] if setpoint == "uncentred" else np.ones(LAYERS), rtol=1e-4)
    table = c.table()
    np.testing.assert_allclose(table["gain"], np.linalg.norm(c.W_, axis=1), rtol=1e-5)
    np.testing.assert_allclose(table["reach"], (v[1:] * c.W_.numpy()).sum(1), atol=1e-5)
    np.testing.assert_allclose(table["cos"], table["reach"] / table["gain"], rtol=1e-5)


@pytest.mark.parametrize("setpoint", ["uncentred", "centred"])
def test_one_direction_is_enough(llama, jacobians, setpoint):
    "The run-time law against -K (x - x*) with full gains and the nearest state on the plane"
    c, K, x = llama(setpoint=setpoint), riccati(jacobians.double()), rows().double()
    for t in range(LAYERS):
        v, beta = c.V_[t].double(), c.offset_[t] + 1.7 * c.mu_[t]
        x_star = x + (beta - x @ v)[:, None] * v
        torch.testing.assert_close(x_star @ v, beta.expand(5).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(c._control(t, x.float(), None, torch.tensor(1.7), {}).double(), -(x - x_star) @ K[t].T, rtol=1e-4, atol=1e-4)


def test_strengths_by_row(llama):
    c, x = llama(), rows()
    for t in range(LAYERS):
        u = c._control(t, x, None, torch.arange(5.), {})
        for i in range(5): torch.testing.assert_close(u[i], c._control(t, x[i:i+1], None, torch.tensor(float(i)), {})[0])


# ---- exactly linear blocks

def test_jacobians_of_linear_blocks(linear):
    for A, exact in zip(Jacobians(linear, TOK, POS[:2], progress=False), matrices(linear)): torch.testing.assert_close(A, exact)


@pytest.mark.parametrize("cls", [ALQR, FeatureLQR])
def test_the_hook_does_what_the_law_says(linear, cls):
    c, A = fit_linear(linear, cls, 1., 1., 1., setpoint="centred"), matrices(linear)
    with ods.steering(linear, c, strength=1.3): seen = block_inputs(linear, TOK, NEG).double()
    x = block_inputs(linear, TOK, NEG)[0].double()
    for t in range(LAYERS):
        alpha = c.offset_[t].double() + 1.3 * c.mu_[t].double() - x @ c.V_[t].double()
        x = x @ A[t].T + alpha[:, None] * c.W_[t].double()
        torch.testing.assert_close(seen[t + 1], x, rtol=1e-5, atol=1e-5)


def final_error(model, c, strength=1.):
    with ods.steering(model, c, strength=strength): x = block_inputs(model, TOK, NEG)[-1]
    pos, neg = (block_inputs(model, TOK, texts)[-1].mean(0) for texts in (POS, NEG))
    v = nn.functional.normalize(pos - neg, dim=0)
    return ((x - neg) @ v / ((pos - neg) @ v)).mean() - strength


def test_the_error_shrinks_with_the_gain_and_the_feature_follows_the_strength(linear):
    by_gain = [abs(final_error(linear, fit_linear(linear, ALQR, q, 1., q, setpoint="centred"))) for q in (0., .1, 1., 10., 100.)]
    assert by_gain == sorted(by_gain, reverse=True) and by_gain[-1] < .1 * by_gain[0]
    c = fit_linear(linear, setpoint="centred")
    ends = [final_error(linear, c, s) + s for s in (-1., 0., .5, 1., 2., 4.)]
    assert all(b > a + .05 for a, b in zip(ends, ends[1:]))


def test_a_blow_is_corrected(linear):
    "Feedback: a disturbance behind block 0 leaves less at the end than in the unsteered model"
    c, blow = fit_linear(linear, ALQR, 10., 1., 10., setpoint="centred"), 2.
    v = nn.functional.normalize(c.end_.double(), dim=0)
    def end(hit, steer):
        hook = decoder_layers(linear)[0].register_forward_hook(lambda m, a, y: y + hit * c.V_[1].double())
        try:
            if not steer: return block_inputs(linear, TOK, NEG)[-1].double() @ v
            with ods.steering(linear, c): return block_inputs(linear, TOK, NEG)[-1].double() @ v
        finally: hook.remove()
    left = {steer: (end(blow, steer) - end(0., steer)).abs().mean() for steer in (False, True)}
    assert left[True] < .3 * left[False]


# ---- what is moved

@pytest.mark.parametrize("positions", ["last", "all"])
def test_only_the_tokens_asked_for(linear, positions):
    "Linear blocks do not mix tokens, so every token that is not steered must come out as it was, bit for bit, in every block"
    c, plain = fit_linear(linear), outputs(linear, LEFT)
    with ods.steering(linear, c, strength=2., positions=positions): moved = outputs(linear, LEFT)
    steered = LEFT.bool() if positions == "all" else torch.zeros_like(LEFT, dtype=torch.bool).index_fill(1, torch.tensor(IDS.shape[1] - 1), True)
    assert torch.equal(moved[:, ~steered], plain[:, ~steered])
    assert (moved[:, steered] != plain[:, steered]).any(-1).all()


def test_rows_where_steering_begins_later(linear):
    c, plain = fit_linear(linear), outputs(linear)
    with ods.steering(linear, c, strength=2., positions=torch.tensor([7, 3, 5])): moved = outputs(linear)
    for row, n in enumerate((7, 3, 5)): assert torch.equal(moved[:, row, :n - 1], plain[:, row, :n - 1]) and (moved[:, row, n - 1:] != plain[:, row, n - 1:]).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_error_no_change_bit_for_bit(llama, dtype):
    c = llama()
    c.V_[1], c.mu_[1] = 0, 0
    c.V_[2], c.mu_[2], c.offset_[2] = torch.eye(WIDTH)[3], 1.5, 0.
    y = rows().to(dtype)
    y[0, 0] = -0.
    edit = c.edits(the_model(dtype=dtype), None, 1.)[1]
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[y.element_size()]
    assert torch.equal(edit(rows(seed=1).to(dtype), y, ONE).view(bits), y.view(bits))
    x = rows(seed=1).to(dtype)
    x[:, 3] = 3.  # where strength 2 wants it
    moved = c.edits(the_model(dtype=dtype), None, 2.)[2]
    assert torch.equal(moved(x, y, 2 * ONE).view(bits), y.view(bits)) and not torch.equal(moved(x, y, ONE), y)
    for quick in edit.prepare(ONE), moved.prepare(2 * ONE):
        assert torch.equal(quick(x, y).view(bits), y.view(bits))
        for z in -torch.zeros_like(y), torch.zeros_like(y): assert torch.equal(quick(x, z).view(bits), z.view(bits)) and torch.equal(quick(x[:1], z[:1]).view(bits), z[:1].view(bits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kw", [dict(), dict(setpoint="centred"), dict(setpoint="centred", also=[(NEG[:9], POS[:9], .5)])], ids=["one", "centred", "two"])
def test_what_is_prepared_once_per_strength(llama, dtype, kw):
    c, x, y = llama(**kw), rows(6, seed=1).to(dtype), rows(6).to(dtype)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for t, edit in c.edits(the_model(dtype=dtype), None, 1.).items():
        for value in torch.tensor([1., -2.5]):
            done, want = edit.prepare(value), edit(x, y, value)
            torch.testing.assert_close(done(x, y), want, rtol=tol, atol=tol)
            assert torch.equal(done(x.view(2, 3, -1), y.view(2, 3, -1)).flatten(0, 1), done(x, y)) and done(x, y).dtype == dtype
    assert llama(setpoint="angular").edits(the_model(), None, 1.)[1].prepare is None


def test_texts_that_end_alike_have_no_feature_before_block_0():
    pos, neg = ([t[:-1] + "z" for t in texts] for texts in (POS, NEG))
    for setpoint in "uncentred", "centred", "angular":
        c = ALQR(setpoint=setpoint, n_jacobian=2).fit(the_model(), TOK, pos, neg, progress=False)
        assert c.V_[0].eq(0).all() and c.W_[0].eq(0).all() and c.mu_[0] == 0 and all(b.isfinite().all() for b in c.buffers())
        with ods.steering(the_model(), c): assert torch.equal(outputs(the_model())[0], outputs(the_model())[0])
        plain = outputs(the_model())[0]
        with ods.steering(the_model(), c): assert torch.equal(outputs(the_model())[0], plain) and not torch.equal(outputs(the_model())[1], plain)


def test_history(llama):
    "With a cache or without, steered tokens stay steered; recomputed without steering, the second token on is another"
    ids, c = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS)), llama()
    kw = dict(do_sample=False, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    with ods.steering(the_model(), c, strength=4.): cached, uncached = (the_model().generate(**ids, **kw, use_cache=use) for use in (True, False))
    with ods.steering(the_model(), c, strength=4., history="unsteered"): other = the_model().generate(**ids, **kw, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.logits[0], cached.logits[0], rtol=1e-3, atol=1e-3)
    assert (other.logits[1] - cached.logits[1]).abs().max() > .1


# ---- which Jacobians

class Forbidden:
    def __len__(self): return LAYERS
    def __getitem__(self, t): raise AssertionError("a Jacobian was asked for")


def test_identity_needs_no_jacobian(jacobians):
    for cls in ALQR, FeatureLQR:
        c, d = (cls(.3, 1., 2., jacobian="identity").fit(the_model(), TOK, POS, NEG, jacobians=A, progress=False) for A in (Forbidden(), None))
        full = cls(.3, 1., 2.).fit(the_model(), TOK, POS, NEG, jacobians=torch.eye(WIDTH).expand(LAYERS, -1, -1), progress=False)
        torch.testing.assert_close(c.W_, full.W_)
        assert torch.equal(c.W_, d.W_)
    with pytest.raises(AssertionError, match="was asked for"): ALQR().fit(the_model(), TOK, POS, NEG, jacobians=Forbidden(), progress=False)


def test_jacobians_can_be_given_in_any_form(tmp_path):
    texts = POS[:3]
    fits = [ALQR(1., 1., 1.).fit(the_model(), TOK, POS, NEG, progress=False, **kw) for kw in (
        dict(jacobian_texts=texts), dict(jacobian_texts=texts, cache_dir=tmp_path), dict(jacobian_texts=texts, cache_dir=tmp_path),
        dict(jacobians=Jacobians(the_model(), TOK, texts, progress=False)), dict(jacobians=list(Jacobians(the_model(), TOK, texts, progress=False))),
        dict(jacobians=torch.stack(list(Jacobians(the_model(), TOK, texts, progress=False)))))]
    assert all(torch.equal(c.W_, fits[0].W_) for c in fits) and len(list(tmp_path.rglob("*.safetensors"))) == LAYERS


def test_texts_of_the_jacobians_are_drawn():
    "By default n_jacobian of the wanted texts, by the seed"
    drawn = ALQR(seed=3, n_jacobian=4)._draw(POS, "jacobian_texts", "n_jacobian")
    assert len(set(drawn)) == 4 and drawn == [t for t in POS if t in drawn] and drawn != ALQR(seed=4, n_jacobian=4)._draw(POS, "jacobian_texts", "n_jacobian")
    a, b = ALQR(seed=3, n_jacobian=4).fit(the_model(), TOK, POS, NEG, progress=False), ALQR(seed=3).fit(the_model(), TOK, POS, NEG, jacobian_texts=drawn, progress=False)
    assert torch.equal(a.W_, b.W_)


def test_feature_only_uses_products(jacobians):
    "From a model, without matrices, and from matrices"
    from .test_riccati import dense_feature_gains
    a = FeatureLQR(1., 1., 1.).fit(the_model(), TOK, POS, NEG, jacobian_texts=POS[:6], progress=False)
    b = FeatureLQR(1., 1., 1.).fit(the_model(), TOK, POS, NEG, jacobians=jacobians, progress=False)
    torch.testing.assert_close(a.W_, b.W_, rtol=1e-4, atol=1e-5)
    V = torch.cat([b.V_, b.end_[None]]).double()
    torch.testing.assert_close(b.W_, dense_feature_gains(jacobians.double(), V[:, None], 1., 1., 1.)[:, 0].float(), rtol=1e-5, atol=1e-6)
    capped = FeatureLQR(1., 1., 1., rank=1).fit(the_model(), TOK, POS, NEG, jacobians=jacobians, progress=False)
    assert "rank=1" in repr(capped) and not torch.allclose(capped.W_, b.W_) and torch.equal(capped.W_[-1], b.W_[-1])


# ---- several set-points

OTHER = sentences("hijklm", 20, 5), sentences("opqrs", 20, 6)


def test_several_set_points_are_all_reached_by_the_nearest_state(llama, jacobians):
    c, K, x = llama(also=[(*OTHER, 1.5)], setpoint="centred"), riccati(jacobians.double()), rows().double()
    assert c.V_.shape == c.W_.shape == (LAYERS, 2, WIDTH) and c.mu_.shape == (LAYERS, 2)
    single, second = llama(setpoint="centred"), llama(pos=OTHER[0], neg=OTHER[1], setpoint="centred")
    torch.testing.assert_close(c.V_, torch.stack([single.V_, second.V_], 1))
    torch.testing.assert_close(c.mu_, torch.stack([single.mu_, 1.5 * second.mu_], 1))
    for t in range(LAYERS):
        V, beta = c.V_[t].double(), (c.offset_[t] + .8 * c.mu_[t]).double()
        step = torch.linalg.lstsq(V, (beta - x @ V.T).T).solution.T  # minimum norm
        torch.testing.assert_close((x + step) @ V.T, beta.expand(5, 2))
        torch.testing.assert_close(c._control(t, x.float(), None, torch.tensor(.8), {}).double(), step @ K[t].T, rtol=1e-4, atol=1e-4)
        assert (V[0] @ V[1]).abs() > .01


def test_several_set_points_are_a_sum_iff_orthogonal(llama):
    c = llama(also=[(*OTHER, 1.)], setpoint="centred")
    parts = [llama(setpoint="centred"), llama(pos=OTHER[0], neg=OTHER[1], setpoint="centred")]
    def apart(c): return max((c._control(t, rows(), None, ONE, {}) - sum(p._control(t, rows(), None, ONE, {}) for p in parts)).norm() for t in range(LAYERS))
    assert apart(c) > .1
    class Turned(ALQR):  # the second feature made orthogonal to the first before gains are computed
        def _feature(self, pos, neg, ratio):
            v, *rest = super()._feature(pos, neg, ratio)
            if hasattr(self, "first"): v = nn.functional.normalize(v - (v * self.first).sum(-1, keepdim=True) * self.first, dim=-1)
            else: object.__setattr__(self, "first", v)
            return v, *rest
    c = llama(Turned, also=[(*OTHER, 1.)])
    assert (c.V_[:, 0] * c.V_[:, 1]).sum(-1).abs().max() < 1e-6
    first, x = llama(), rows()
    for t in range(LAYERS):
        summed = sum(c._alpha(t, x, ONE)[:, i:i+1] * w for i, w in enumerate((first.W_[t], c.W_[t, 1])))
        torch.testing.assert_close(c._control(t, x, None, ONE, {}), summed)
        torch.testing.assert_close(c.W_[t, 0], first.W_[t])


def test_the_same_set_point_twice_is_one(llama):
    once, twice = llama(setpoint="centred"), llama(setpoint="centred", also=[(POS, NEG, 1.)])
    for t in range(LAYERS): torch.testing.assert_close(twice._control(t, rows(), None, ONE, {}), once._control(t, rows(), None, ONE, {}), rtol=1e-4, atol=1e-4)


def test_several_set_points_on_linear_blocks(linear):
    c, A = fit_linear(linear, ALQR, 1., 1., 1., also=[(*OTHER, 1.)], setpoint="centred"), matrices(linear)
    with ods.steering(linear, c): seen = block_inputs(linear, TOK, NEG).double()
    x = seen[0]
    for t in range(LAYERS):
        alpha = (c.offset_[t] + c.mu_[t]).double() - x @ c.V_[t].double().T
        x = x @ A[t].T + alpha @ c.W_[t].double()
        torch.testing.assert_close(seen[t + 1], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kw", [dict(also=[(*OTHER, 1.5)]), dict(setpoint="angular", angle=120.)], ids=["several", "angular"])
def test_more_than_one_row_survives_a_folder(llama, tmp_path, kw):
    c = llama(**kw)
    c.save_pretrained(tmp_path)
    again, x = ods.load_steerer(tmp_path), rows()
    assert type(again) is ALQR and again.card == c.card
    for t in range(LAYERS): assert torch.equal(again._control(t, x, None, torch.arange(5.), {}), c._control(t, x, None, torch.arange(5.), {}))
    for i in range(5): torch.testing.assert_close(c._control(1, x, None, torch.arange(5.), {})[i], c._control(1, x[i:i+1], None, torch.tensor(float(i)), {})[0])


# ---- the angular set-point

@pytest.mark.parametrize("angle", [180., 90., 30., 0.])
def test_angular_is_a_rotation_in_the_plane(llama, jacobians, angle):
    c, K, x = llama(setpoint="angular", angle=angle), riccati(jacobians.double()), rows().double()
    e = (block_inputs(the_model(), TOK, NEG).mean(1) - block_inputs(the_model(), TOK, POS).mean(1)).double().numpy()  # towards the unwanted
    centred = e - e.mean(0)
    pc = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    for t in range(LAYERS):
        b1 = e[t] / np.linalg.norm(e[t])
        b2 = pc - (pc @ b1) * b1
        b2 /= np.linalg.norm(b2)
        np.testing.assert_allclose(c.V_[t, 0], b1, atol=1e-5)
        assert abs(abs(c.V_[t, 1].numpy() @ b2) - 1) < 1e-5
        b1, b2 = c.V_[t].double()
        p1, p2 = x @ b1, x @ b2
        rho = (p1**2 + p2**2).sqrt()
        target = x + ((rho * math.cos(math.radians(angle)) - p1)[:, None] * b1 + (rho * math.sin(math.radians(angle)) - p2)[:, None] * b2)
        torch.testing.assert_close(target.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=1e-5)
        turned = torch.atan2(target @ b2, target @ b1).rad2deg() % 360
        torch.testing.assert_close(torch.minimum((turned - angle).abs(), 360 - (turned - angle).abs()), torch.zeros(5).double(), rtol=0, atol=1e-2)
        for strength in (1., .5): torch.testing.assert_close(c._control(t, x.float(), None, torch.tensor(strength), {}).double(), strength * (target - x) @ K[t].T, rtol=1e-4, atol=1e-4)


def test_angular_strength_zero_changes_nothing(llama):
    plain = logits(the_model())
    with ods.steering(the_model(), llama(setpoint="angular"), strength=0.): assert torch.equal(logits(the_model()), plain)


# ---- tracking

def test_its_own_path_needs_no_correction():
    model, prompt = the_model(), "the quick brown"
    ids = torch.tensor([TOK(prompt)["input_ids"]])
    tracker, plain = Tracker().fit(model, TOK, prompt, progress=False), logits(model, ids)
    with ods.steering(model, tracker) as h: assert torch.equal(logits(model, ids), plain) and h.applied == LAYERS
    said = generate_text(model, TOK, [prompt], **GREEDY)
    with ods.steering(model, tracker): assert generate_text(model, TOK, [prompt], **GREEDY) == said


def test_another_prompt_is_brought_onto_the_path(linear):
    one, other = "the quick brown", "a slow fox"
    tracker = Tracker(1., 1e-6, 1.).fit(linear, TOK, one, progress=False)
    path, plain = block_inputs(linear, TOK, [one]), block_inputs(linear, TOK, [other])
    with ods.steering(linear, tracker): held = block_inputs(linear, TOK, [other])
    torch.testing.assert_close(held[1:], path[1:], rtol=1e-3, atol=1e-3)
    assert (plain[1:] - path[1:]).norm(dim=-1).min() > 1


@pytest.mark.parametrize("weights", [(100., .1, 1000.), (1., 1., 1.)], ids=str)
def test_deviations_from_the_path_obey_the_closed_loop(linear, weights):
    tracker, A = Tracker(*weights).fit(linear, TOK, "the quick brown", progress=False), matrices(linear)
    K, path = riccati(A, *weights), block_inputs(linear, TOK, ["the quick brown"])[:, 0].double()
    with ods.steering(linear, tracker, strength=1.): held = block_inputs(linear, TOK, ["a slow fox"])[:, 0].double()
    delta = held[0] - path[0]
    for t in range(LAYERS):
        delta = (A[t] - K[t]) @ delta
        torch.testing.assert_close(held[t + 1] - path[t + 1], delta, rtol=1e-4, atol=1e-4)


def test_the_micro_model_says_the_word_of_the_other_prompt():
    lm = ods.load_micro()
    one, other = "Q: what colour is the givel?\nA: the colour of the givel is", "Q: where is the vipon found?\nA: the vipon is found in"
    def first(prompt): return generate_text(lm.model, lm.tokenizer, [prompt], max_new_tokens=1, do_sample=False)[0]
    wanted, plain = first(one), first(other)
    tracker = Tracker().fit(lm.model, lm.tokenizer, one, progress=False)
    with ods.steering(lm.model, tracker): assert first(other) == wanted != plain


@pytest.mark.parametrize("use_cache", [True, False])
def test_only_the_first_new_token_is_held(use_cache):
    model, ids = the_model(), IDS[:, :5]
    tracker = Tracker().fit(model, TOK, "the quick brown", progress=False)
    kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with ods.steering(model, tracker):
        out = model.generate(ids, **kw, use_cache=use_cache)
        again = model.generate(ids, **kw, use_cache=use_cache)
        with torch.no_grad(): first = model(ids, use_cache=True)
    assert torch.equal(out.sequences, again.sequences)
    torch.testing.assert_close(out.logits[0], first.logits[:, -1])
    with torch.no_grad():  # by hand: later tokens without steering, behind what the first pass left in the cache
        if use_cache: later = model(out.sequences[:, 5:6], past_key_values=first.past_key_values).logits[:, -1]
        else: later = model(out.sequences[:, :6], use_cache=False).logits[:, -1]
    torch.testing.assert_close(out.logits[1], later, rtol=1e-3, atol=1e-3)


def test_tracker_in_a_padded_batch():
    model, tracker = the_model(), Tracker().fit(the_model(), TOK, "the quick brown", progress=False)
    prompts = ["a", "the slow fox", "the quick brown"]
    with ods.steering(model, tracker):
        together = generate_text(model, TOK, prompts, **GREEDY)
        assert together == [generate_text(model, TOK, [p], **GREEDY)[0] for p in prompts]


def test_tracker_is_described_and_not_saved(tmp_path):
    tracker = Tracker().fit(the_model(), TOK, "the quick brown", progress=False)
    assert "fitted on 1 + 0 texts" in repr(tracker) and "not fitted" in repr(Tracker())
    with pytest.raises(ValueError, match="not in odesteer's registry"): tracker.save_pretrained(tmp_path)


# ---- bad input

@pytest.mark.parametrize("kw, error, message", [
    (dict(r=0.), ValueError, "r=0.0 is no weight"), (dict(q=-1.), ValueError, "q=-1.0 is no weight"), (dict(setpoint="mean"), ValueError, "'uncentred', 'centred' or 'angular'; got 'mean'"),
    (dict(jacobian="none"), ValueError, "'mean' or 'identity'; got 'none'"), (dict(setpoint="angular", angle=math.inf), ValueError, "angle must be"),
], ids=str)
def test_bad_hyper_parameters(kw, error, message):
    for cls in ALQR, FeatureLQR:
        with pytest.raises(error, match=re.escape(message)): cls(**kw)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="rank must be a whole number"): FeatureLQR(rank=rank)


@pytest.mark.parametrize("kw, message", [
    (dict(jacobians=torch.ones(2, WIDTH, WIDTH)), "2 Jacobians were given, but the model has 4 blocks"),
    (dict(jacobians=torch.ones(4, 8, 8)), r"A\[3\] has width 8"),
    (dict(jacobians=torch.full((4, WIDTH, WIDTH), math.nan)), "holds NaN or infinity"),
    (dict(jacobians=torch.ones(4, WIDTH, WIDTH), jacobian_texts=POS), "leave out jacobian_texts="),
    (dict(jacobian_texts=[]), "jacobian_texts is empty"),
    (dict(also=[(POS, [], 1.)]), r"also\[0\] is empty"),
    (dict(also=[(POS, NEG)]), "also must hold"), (dict(also=["abc"]), "also must hold"),
    (dict(also=[(POS, POS, 1.)]), "same mean states"), (dict(also=[(POS, NEG, "a")]), "finite number as ratio"),
], ids=str)
def test_bad_fits(kw, message):
    with pytest.raises(ValueError, match=message): ALQR().fit(the_model(), TOK, POS, NEG, progress=False, **kw)


def test_one_set_point_where_only_one_fits(jacobians):
    with pytest.raises(ValueError, match="turns in one plane"): ALQR(setpoint="angular").fit(the_model(), TOK, POS, NEG, also=[(*OTHER, 1.)], jacobians=jacobians, progress=False)
    with pytest.raises(ValueError, match="holds one set-point: leave out also="): ods.SPID().fit(the_model(), TOK, POS, NEG, also=[(*OTHER, 1.)], progress=False)


def test_tracker_errors():
    with pytest.raises(ValueError, match="text 0"): Tracker().fit(the_model(), TOK, ("a", ""), progress=False)
    with pytest.raises(RuntimeError, match="not fitted"): Tracker().edits(the_model())
    with pytest.raises(ValueError, match="r=0"): Tracker(r=0)


@pytest.mark.parametrize("kw", [dict(n_texts=-3), dict(n_texts=0), dict(n_jacobian=1.5), dict(max_tokens=True)], ids=str)
def test_impossible_numbers_of_texts(kw):
    with pytest.raises(ValueError, match="must be a positive whole number"): ALQR(**kw).fit(the_model(), TOK, POS, NEG, progress=False)


@pytest.mark.parametrize("ratio", [0., -1.])
def test_a_second_set_point_at_or_beyond_the_unwanted_mean(ratio):
    "Ratio 0 holds a feature at its unwanted mean, -1 as far on the other side"
    other = OTHER
    c = ALQR(setpoint="centred").fit(the_model(), TOK, POS, NEG, also=[(*other, ratio)], progress=False)
    low, high = (block_inputs(the_model(), TOK, texts)[:-1].double().mean(1) for texts in other[::-1])
    goal = c.offset_[:, 1] + c.mu_[:, 1]
    torch.testing.assert_close(goal.double(), ((low + ratio*(high - low)) * c.V_[:, 1]).sum(-1), atol=1e-4, rtol=1e-4)
