"""Solvers against closed forms, ODESteer against NumPy in float64, stopping against SciPy's root finder, metrics against SciPy and scikit-learn."""
import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm, fractional_matrix_power
from scipy.optimize import brentq
from sklearn.covariance import LedoitWolf
from torch.utils._python_dispatch import TorchDispatchMode

import odesteer as ods
from odesteer.barrier import GaussianBarrier, LinearBarrier, ScoreBarrier, ascent, certificate
from odesteer.density import barrier_quality, held_out_values, quality
from odesteer.euler import contrast
from odesteer.ode import ADAPTIVE, climb, integrate, metric_root

D = 12
SMALL = dict(n_components=128, gamma=1.0, C=100.0)


def draw(n, shift, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g) * torch.linspace(.4, 1.6, D) + 1
    x[:, :3] += shift * (1 + .5 * x[:, 3:6]**2)  # curved classes, so that the field turns
    return x


POS, NEG, NEW = draw(90, .5, 0), draw(70, -.5, 1), draw(40, -.5, 2)


def fitted(cls=ods.ODESteer, dtype=torch.float32, **kw):
    return cls(**{**SMALL, **kw}).fit(POS.to(dtype), NEG.to(dtype))


@pytest.fixture(scope="module")
def steerer(): return fitted()


# --- the independent computation: NumPy, float64, from the fitted tables only

class Reference:
    "h, its gradient, the field and fixed-step solvers, written from the formulas"
    def __init__(self, s):
        b, f = s.barrier, s.barrier.features
        self.w, self.b = b.coef_.double().numpy(), b.intercept_.double().item() + b.log_prior_.double().item()
        self.H, self.S, self.n, self.gamma, self.c0 = f.indexHash_.numpy(), f.bitHash_.numpy().astype(float), f.n_components, f.gamma, f.coef0
        self.normalize, self.retract = s.normalize, s.retract
        self.m = b.shift_.double().numpy() if s.coordinates != "raw" else np.zeros(D)
        self.s = b.scale_.double().numpy() if s.coordinates == "standardised" else np.ones(D)
        self.M = s.metric_.double().numpy() if s.metric == "covariance" else np.eye(D)

    def spectra(self, x):
        z = np.append(np.sqrt(self.gamma) * x, np.sqrt(self.c0))
        out = []
        for H, S in zip(self.H, self.S):
            sketch = np.zeros(self.n)
            for j, bucket in enumerate(H): sketch[bucket] += S[j] * z[j]
            out.append(np.fft.rfft(sketch))
        return out

    def unit(self, a):
        z = self.s * (a - self.m)
        r = np.linalg.norm(z) + 1e-12 if self.normalize else 1.0
        return z / r, r

    def h(self, a):
        product = np.prod(self.spectra(self.unit(a)[0]), axis=0)
        return self.w @ np.fft.irfft(product, self.n) + self.b

    def grad(self, a):
        x, r = self.unit(a)
        F, W, g = self.spectra(x), np.fft.rfft(self.w), np.zeros(D)
        for k in range(len(F)):
            others = np.prod([F[j] for j in range(len(F)) if j != k], axis=0) if len(F) > 1 else 1.0
            c = np.fft.irfft(np.conj(others) * W, self.n)
            g += np.sqrt(self.gamma) * np.array([self.S[k, j] * c[self.H[k, j]] for j in range(D)])
        return self.s * ((g - x * (x @ g)) / r if self.normalize else g)

    def field(self, a):
        u = a / np.linalg.norm(a)
        flat = (lambda v: v - u * (u @ v)) if self.retract else (lambda v: v)
        v = flat(self.M @ flat(self.grad(a)))
        return v / np.linalg.norm(v)

    def path(self, a, T, steps, solver):
        f, dt, out = self.field, T / steps, [a]
        for _ in range(steps):
            x = out[-1]
            if solver == "euler": y = x + dt * f(x)
            elif solver == "midpoint": y = x + dt * f(x + dt / 2 * f(x))
            else:
                k1 = f(x)
                k2 = f(x + dt / 2 * k1)
                k3 = f(x + dt / 2 * k2)
                k4 = f(x + dt * k3)
                y = x + dt * (k1 / 6 + k2 / 3 + k3 / 3 + k4 / 6)
            out.append(y * np.linalg.norm(a) / np.linalg.norm(y) if self.retract else y)
        return np.stack(out)

    def flow(self, a, T):
        "the exact flow, as a function of time"
        f = self.field if T >= 0 else lambda x: -self.field(x)
        return solve_ivp(lambda t, x: f(x), (0, abs(T)), a, method="DOP853", rtol=1e-11, atol=1e-12, dense_output=True).sol


CASES = [dict(), dict(solver="midpoint"), dict(solver="rk4", steps=4), dict(degree=3), dict(degree=1), dict(coef0=.3, gamma=.1), dict(normalize=False, gamma=.1),
         dict(metric="covariance"), dict(metric="covariance", power=.5, solver="rk4"), dict(retract=True), dict(retract=True, metric="covariance", normalize=False, gamma=.1, solver="midpoint")]
CASES += [dict(coordinates=c, **kw) for c in ("centred", "standardised") for kw in (dict(), dict(degree=3), dict(normalize=False, gamma=.1), dict(retract=True), dict(metric="covariance"), dict(calibrate=True))] + [dict(calibrate=True)]


@pytest.mark.parametrize("kw", CASES, ids=str)
@pytest.mark.parametrize("T", [3.0, -1.5])
def test_trajectories_are_numpys(kw, T):
    s = fitted(**kw)
    ref, rows = Reference(s), NEW[:6]
    expected = np.stack([ref.path(a, T, s.steps, s.solver) for a in rows.double().numpy()], 1)
    scale = np.linalg.norm(expected, axis=-1, keepdims=True)
    for dtype, tol in (torch.float32, 1e-5), (torch.float64, 1e-10):
        path = s.trajectory(rows.to(dtype), T)
        assert path.dtype == dtype and path.shape == (s.steps + 1, 6, D)
        assert (np.abs(path.double().numpy() - expected) / scale).max() < tol
        torch.testing.assert_close(path[-1], s.steer(rows.to(dtype), T), rtol=0, atol=0)
        h = s.stop_at(rows.to(dtype), until=-1e9).h.double().numpy()  # everything is above: h of the rows as they are
        h_ref = np.array([ref.h(a) for a in rows.double().numpy()])
        assert np.abs(h - h_ref).max() <= tol * max(1, np.abs(h_ref).max())


def test_per_row_strength_is_each_row_alone(steerer):
    T = torch.tensor([0., 1., -1., 2.5, -.3])
    together = steerer.steer(NEW[:5], T)
    for i in range(5): torch.testing.assert_close(together[i], steerer.steer(NEW[i], T[i].item()), rtol=1e-5, atol=1e-5)
    assert torch.equal(together[0], NEW[0])
    torch.testing.assert_close(steerer.trajectory(NEW[:5], T)[-1], together)
    torch.testing.assert_close(steerer.trajectory(NEW[:5], share=.2)[-1], steerer.steer(NEW[:5], .2 * steerer.median_norm_.item()))
    torch.testing.assert_close(steerer.trajectory(NEW[:5], spread=.5)[-1], steerer.steer(NEW[:5], .5 * steerer.spread_.item()))
    torch.testing.assert_close(steerer.trajectory(NEW[:5], spread=T)[-1], steerer.steer(NEW[:5], spread=T))


# --- solvers

J = torch.tensor([[0., -1.3], [1.3, 0.]], dtype=torch.float64)
def turn(a): return a @ J.T
def turned(a, T): return a @ torch.as_tensor(expm(J.numpy() * T)).T


@pytest.mark.parametrize("name,order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("problem", ["turn", "logistic", "steering"])
def test_order_of_convergence(name, order, problem, steerer):
    if problem == "turn": f, a, exact = turn, torch.tensor([[1., .5], [-2., 3.]], dtype=torch.float64), lambda a: turned(a, 2.0)
    elif problem == "logistic": f, a, exact = lambda a: a * (1 - a), torch.tensor([[.1, .3, .6]], dtype=torch.float64), lambda a: 1 / (1 + (1 / a - 1) * np.exp(-2.))
    else:
        x = NEW[:1].double()
        f, a, exact = steerer._on(x)._field, x, lambda a: torch.as_tensor(Reference(steerer).flow(a[0].numpy(), 2.0)(2.0))[None]
    errors = [(integrate(f, a, 2.0, n, name) - exact(a)).norm().item() for n in (32, 64)]
    assert ods.SOLVERS[name].order == order
    assert abs(np.log2(errors[0] / errors[1]) - order) < .2


def test_integrate_runs_backwards_takes_a_function_and_keeps_the_path():
    a = torch.tensor([[1., .5], [-2., 3.]], dtype=torch.float64)
    back = integrate(turn, integrate(turn, a, 1., 50, "rk4"), -1., 50, "rk4")
    torch.testing.assert_close(back, a, atol=1e-6, rtol=0)
    path = integrate(turn, a, 1., 5, lambda f, x, dt: x + dt, path=True)
    torch.testing.assert_close(path, a + torch.linspace(0, 1, 6, dtype=a.dtype)[:, None, None])


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_keeps_its_tolerance_in_every_row(method):
    a = torch.tensor([[1., .5], [0., 0.], [300., -20.]], dtype=torch.float64)
    T = torch.tensor([2., 1., -3.], dtype=torch.float64)
    exact = torch.stack([turned(x, t.item()) for x, t in zip(a, T)])
    end = integrate(turn, a, T, solver=method, tol=1e-5)
    assert ((end - exact).norm(dim=-1) <= 5e-3 * (exact.norm(dim=-1) + 1)).all()
    torch.testing.assert_close(integrate(turn, a, T, 4, method, path=True, tol=1e-5)[-1], end, atol=1e-2, rtol=1e-3)
    with_many = integrate(turn, torch.cat([a, torch.zeros(5000, 2, dtype=a.dtype)]), torch.cat([T, torch.zeros(5000, dtype=a.dtype)]), solver=method, tol=1e-5)
    torch.testing.assert_close(with_many[:3], end, atol=1e-8, rtol=1e-8)  # thousands of easy rows do not hide a hard one


def test_adaptive_steering_follows_the_exact_flow(steerer):
    s = fitted(solver="dopri5")
    x = NEW[:4].double()
    exact = torch.stack([torch.as_tensor(Reference(steerer).flow(a.numpy(), 3.0)(3.0)) for a in x])
    torch.testing.assert_close(s.steer(x, 3.0), exact, atol=1e-4, rtol=1e-4)
    assert torch.equal(s.steer(x, 0.0), x)
    torch.testing.assert_close(s.steer(x.float(), 3.0), exact.float(), atol=1e-3, rtol=1e-3)


def test_adaptive_says_why_it_gives_up():
    with pytest.raises(RuntimeError, match="dopri5 gave up.*smaller T.*fixed-step"): integrate(lambda a: ascent(-a), torch.ones(2, 3), 5., solver="dopri5")


# --- special cases that are other methods

@pytest.mark.parametrize("kw", [dict(), dict(metric="covariance", power=.5), dict(features="rff"), dict(features="linear"), dict(coordinates="centred", calibrate=True), dict(coordinates="standardised")], ids=str)
def test_one_step_is_step_odesteer(kw):
    step, one = fitted(ods.StepODESteer, **kw), fitted(steps=1, **kw)
    T = torch.linspace(-2, 2, len(NEW))
    assert torch.equal(step.steer(NEW, T), one.steer(NEW, T))
    torch.testing.assert_close(step.steer(NEW, T), NEW + T[:, None] * step.vector_field(NEW))


def test_linear_features_are_iti():
    iti, linear = ods.ITI(C=.5).fit(POS, NEG), fitted(features="linear", normalize=False, C=.5)
    for T in (2.0, -1.0): torch.testing.assert_close(linear.steer(NEW, T), iti.steer(NEW, T), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.barrier.value(NEW), ods.implied_barrier(iti).value(NEW), atol=1e-4, rtol=1e-4)


def test_lda_probe_and_caa_climb_one_barrier_in_two_metrics():
    Sigma = metric_root(contrast(POS.double(), NEG.double()), 1.0)
    delta = (POS.double().mean(0) - NEG.double().mean(0))
    h = GaussianBarrier(POS.double().mean(0), NEG.double().mean(0), Sigma)
    x = NEW.double()
    def direction(p): return ods.ODESteer(barrier=h, metric="covariance", power=p).fit(POS.double(), NEG.double()).vector_field(x)
    probe = torch.linalg.solve(Sigma, delta)
    torch.testing.assert_close(direction(1.0), (delta / delta.norm()).expand_as(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(direction(0.0), (probe / probe.norm()).expand_as(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(ods.ODESteer(barrier=h).fit(POS.double(), NEG.double()).vector_field(x), direction(0.0))
    # in sphered coordinates every power is steepest ascent of h per unit of its own length
    half = torch.as_tensor(fractional_matrix_power(Sigma.numpy(), .5).real)
    v = half @ probe
    torch.testing.assert_close(direction(.5), (v / v.norm()).expand_as(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("power", [0., .25, .5, 1.])
@pytest.mark.parametrize("rows", [5, 90])  # fewer rows than dimensions, and more
def test_metric_is_a_power_of_the_shrunk_covariance(power, rows):
    pos, neg = POS[:rows].double(), NEG[:rows].double()
    X = torch.cat([pos - pos.mean(0), neg - neg.mean(0)]).numpy()
    Sigma = LedoitWolf(assume_centered=True).fit(X).covariance_
    np.testing.assert_allclose(metric_root(contrast(pos, neg), power).numpy(), fractional_matrix_power(Sigma, power).real, atol=1e-10)


def test_covariance_metric_still_climbs():
    s = fitted(metric="covariance", steps=40)
    assert certificate(s.barrier, s.trajectory(NEW, 1.0), tol=1e-4).share_monotone >= .99


# --- the sphere

@given(T=st.floats(-20, 20), steps=st.integers(1, 30))
@settings(deadline=None, max_examples=25)
def test_euler_adds_exactly_the_square_of_each_step(T, steps):
    s = ods.ODESteer(barrier=_shared().barrier, steps=steps).fit(POS.double(), NEG.double())
    x = NEW[:5].double()
    torch.testing.assert_close(s.steer(x, T).square().sum(-1), x.square().sum(-1) + T**2 / steps, rtol=1e-9, atol=1e-9)


_cache = []
def _shared():
    if not _cache: _cache.append(fitted())
    return _cache[0]


@pytest.mark.parametrize("kw", [dict(), dict(solver="rk4"), dict(metric="covariance"), dict(normalize=False, gamma=.1), dict(features="linear", normalize=False), dict(barrier=LinearBarrier(torch.ones(D))), dict(coordinates="centred"), dict(coordinates="standardised")], ids=str)
def test_retract_keeps_norms_and_the_field_is_the_derivative(kw):
    s, x, e = fitted(retract=True, **kw), NEW.double(), 1e-5
    for T in (4.0, -4.0, 50.0): torch.testing.assert_close(s.trajectory(x, T).norm(dim=-1), x.norm(dim=-1).expand(s.steps + 1, -1))
    torch.testing.assert_close((s.steer(x, e) - s.steer(x, -e)) / (2 * e), s.vector_field(x), atol=1e-6, rtol=0)
    zero = torch.zeros(1, D)
    assert torch.equal(s.steer(zero, 1.0), zero)  # a sphere of radius 0


def test_h_rises_along_trajectories_of_held_out_negatives():
    s = fitted()
    c = certificate(s.barrier, s.trajectory(NEW, share=.3), tol=1e-5)
    assert c.share_monotone >= .99 and c.share_risen == 1.0


# --- stopping at a level

@pytest.mark.parametrize("nats", [.3, 2., -1.])
def test_nats_are_those_of_the_exact_flow(nats):
    s = fitted(solver="rk4", steps=40)
    ref, x = Reference(s), NEW[:6].double()
    stop = s.stop_at(x, nats=nats)
    for i, a in enumerate(x.numpy()):
        horizon = 1.2 * abs(stop.T[i].item())
        flow = ref.flow(a, np.sign(nats) * horizon)
        t = brentq(lambda t: ref.h(flow(t)) - ref.h(a) - nats, 0, horizon, xtol=1e-12)
        assert stop.reached[i] and abs(abs(stop.T[i].item()) - t) < 1e-5 and np.sign(stop.T[i].item()) == np.sign(nats)
        np.testing.assert_allclose(stop.a[i].numpy(), flow(t), atol=1e-5)
        assert abs(ref.h(stop.a[i].numpy()) - ref.h(a) - nats) < 1e-6
    torch.testing.assert_close(s.steer(x, nats=nats), stop.a, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("retract", [False, True])
def test_rows_end_on_the_level_and_never_below(dtype, solver, retract):
    s, x = fitted(dtype=dtype, solver=solver, retract=retract), torch.cat([NEW, POS[:30]]).to(dtype)
    for level in (-1.0, 0.0, 1.7):
        h0, stop = s.barrier.value(x), s.stop_at(x, until=level)
        good = h0 >= level
        assert stop.reached.all() and (stop.h >= level).all() and (s.barrier.value(stop.a) > level - 1e-5).all()
        assert (stop.h[~good] - level).max() < (1e-4 if dtype == torch.float32 else 1e-6)
        assert torch.equal(stop.a[good], x[good]) and (stop.T[good] == 0).all() and (stop.T[~good] > 0).all()
        torch.testing.assert_close(s.steer(x, until=level), stop.a, rtol=0, atol=0)
        # the same place as steering for the time it took
        if solver != "euler": torch.testing.assert_close(s.steer(x, stop.T.clamp(max=.3)), s.trajectory(x, stop.T.clamp(max=.3))[-1])


def test_mixed_signs_and_zero_in_one_batch(steerer):
    nats = torch.tensor([1.0, -1.0, 0.0, 3.0, -2.0])
    stop = steerer.stop_at(NEW[:5], nats=nats)
    torch.testing.assert_close(stop.h - steerer.barrier.value(NEW[:5]), nats, atol=1e-4, rtol=0)
    assert torch.equal(stop.T.sign(), nats.sign()) and torch.equal(stop.a[2], NEW[2]) and stop.reached.all()


def test_bf16_rows_that_are_good_stay_bit_identical_and_others_move(steerer):
    x = torch.cat([NEW, POS]).bfloat16()
    y, h = steerer.steer(x, until=1.0), steerer.barrier.value(x.float())
    assert y.dtype == torch.bfloat16 and torch.equal(y[h >= 1], x[h >= 1])
    assert torch.equal(y, torch.where((h >= 1)[:, None], x, steerer.stop_at(x, until=1.0).a.bfloat16()))
    assert steerer.stop_at(x, until=1.0).a.dtype == torch.float32


def test_shapes_of_levels(steerer):
    x = NEW[:6].reshape(2, 3, D)
    flat = steerer.steer(NEW[:6], nats=torch.tensor([1., 1., 1., -2., -2., -2.]))
    torch.testing.assert_close(steerer.steer(x, nats=torch.tensor([1., -2.])).reshape(6, D), flat)
    torch.testing.assert_close(steerer.steer(NEW[0], until=0.5), steerer.steer(NEW[:1], until=0.5)[0], atol=1e-4, rtol=1e-4)
    assert steerer.stop_at(NEW[0], until=.5).reached.shape == ()


def test_out_of_reach_stops_at_the_best_is_flagged_and_said_once():
    s = fitted()
    with pytest.warns(UserWarning, match="2 of 3 rows could not reach") as warned:
        y = s.steer(NEW[:3], until=torch.tensor([1e6, 0., 1e6]))
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = s.steer(NEW[:3], until=torch.tensor([1e6, 0., 1e6]))
    assert torch.equal(y, again)
    stop = s.stop_at(NEW[:3], until=torch.tensor([1e6, 0., 1e6]))
    assert stop.reached.tolist() == [False, True, False]
    h = s.barrier.value(s.trajectory(NEW[:3], s.median_norm_))
    torch.testing.assert_close(stop.h[[0, 2]], h.amax(0)[[0, 2]], atol=1e-4, rtol=1e-5)
    with pytest.warns(UserWarning, match="could not reach"): fitted(max_T=1e-3).steer(NEW, until=1e3)


def test_the_cap_is_max_T_or_T_or_share_or_spread(steerer):
    far = dict(until=1e6)
    for kw, cap in (dict(), steerer.median_norm_.item()), (dict(T=.5), .5), (dict(share=.1), .1 * steerer.median_norm_.item()), (dict(spread=.2), .2 * steerer.spread_.item()):
        assert steerer.stop_at(NEW, **far, **kw).T.max() <= cap * (1 + 1e-5)
    with warnings.catch_warnings():  # that far is too far
        warnings.simplefilter("ignore")
        torch.testing.assert_close(steerer.steer(NEW, until=1., spread=.2), steerer.steer(NEW, until=1., T=.2 * steerer.spread_.item()))
    assert fitted(max_T=.7).stop_at(NEW, **far).T.max() <= .7 + 1e-5
    for unit in "T", "share", "spread":
        with pytest.raises(ValueError, match="cannot be negative"): steerer.steer(NEW, until=0., **{unit: -1.})


def right(a): return torch.ones_like(a)
def on_axis(h): return lambda a: h(a[..., 0])


def test_climb_when_the_first_step_crosses():
    stop = climb(right, on_axis(lambda x: x), torch.tensor([[0.]]), 1e-3, max_T=100., steps=10)
    assert stop.reached.all() and 0 <= stop.h.item() - 1e-3 < 1e-6 and abs(stop.T.item() - 1e-3) < 1e-6


def test_climb_stays_where_h_is_flat_or_falls():
    for h in (lambda x: 0 * x, lambda x: -x):
        stop = climb(right, on_axis(h), torch.zeros(3, 1), 1.0, max_T=5.)
        assert not stop.reached.any() and (stop.T == 0).all() and (stop.a == 0).all()


def test_climb_over_a_peak_below_the_level_returns_to_the_best_and_finds_a_later_rise():
    start = torch.zeros(1, 1)
    stop = climb(right, on_axis(lambda x: -(x - 2)**2), start, 1.0, max_T=4., steps=8)
    assert not stop.reached.any() and stop.h.item() == 0 and stop.T.item() == 2 and stop.a.item() == 2
    stop = climb(right, on_axis(lambda x: (x - 1)**3 - (x - 1)), start, 2.0, max_T=4., steps=40)  # up, down, then up for good
    root = brentq(lambda x: (x - 1)**3 - (x - 1) - 2, 1, 4)
    assert stop.reached.all() and abs(stop.T.item() - root) < 1e-5


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1., 1e6, 1e20])
def test_climb_is_never_below_the_level_by_rounding(size):
    g = torch.Generator().manual_seed(3)
    slope, start = size * (1 + torch.rand(200, generator=g)), torch.rand(200, 1, generator=g)
    def h(a): return slope * (a[..., 0] + 7)
    level = slope * (8.5 + torch.rand(200, generator=g))
    stop = climb(right, h, start, level, max_T=10.)
    assert stop.reached.all() and (stop.h >= level).all() and (h(stop.a) >= level).all()
    assert ((stop.h - level) <= 4e-6 * level).all()


@given(st.lists(st.floats(0, 5), min_size=6, max_size=6), st.floats(.01, .99), st.integers(1, 9), st.sampled_from(["euler", "rk4"]))
@settings(deadline=None, max_examples=60)
def test_climb_brackets_the_crossing_of_any_rising_h(rises, share, steps, solver):
    knots = np.linspace(0, 3, 7)
    values = np.concatenate([[0], np.cumsum(np.array(rises) + 1e-3)])
    level = share * values[-1]
    def h(a): return torch.as_tensor(np.interp(a[..., 0].numpy(), knots, values))
    stop = climb(right, h, torch.zeros(1, 1, dtype=torch.float64), level, max_T=3., steps=steps, solver=solver)
    assert stop.reached.all() and stop.h.item() >= level
    exact = np.interp(level, values, knots)
    step = 3 / steps
    assert exact - 1e-9 <= stop.T.item() <= np.ceil(exact / step + 1e-9) * step + 1e-9  # never early, never past the step that crosses


@given(st.floats(-2, 2), st.floats(.1, 4), st.floats(.02, .98), st.integers(1, 9), st.sampled_from(["euler", "midpoint", "rk4"]))
@settings(deadline=None, max_examples=60)
def test_climb_lands_on_the_level_of_a_smooth_h(middle, sharp, share, steps, solver):
    def h(a): return torch.tanh(sharp * (a[..., 0] - middle)) + a[..., 0] / 5
    ends = [h(torch.tensor([x], dtype=torch.float64)).item() for x in (0., 3.)]
    level = ends[0] + share * (ends[1] - ends[0])
    root = brentq(lambda x: h(torch.tensor([x], dtype=torch.float64)).item() - level, 0, 3, xtol=1e-13)
    stop = climb(right, h, torch.zeros(1, 1, dtype=torch.float64), level, max_T=3., steps=steps, solver=solver)
    assert stop.reached.all() and 0 <= stop.h.item() - level < 1e-6 and abs(stop.T.item() - root) < 1e-5


def test_climb_bad_rows_do_not_spoil_others():
    a = torch.tensor([[0.], [float("nan")], [float("inf")], [.5]])
    stop = climb(right, on_axis(lambda x: x), a, 1.0, max_T=2.)
    assert stop.reached.tolist() == [True, False, True, True]
    torch.testing.assert_close(stop.a[[0, 3]], torch.ones(2, 1), atol=1e-6, rtol=0)
    assert torch.equal(stop.a[2], a[2])


def test_climb_needs_a_fixed_step_solver(steerer):
    with pytest.raises(ValueError, match="stopping at a level needs a fixed-step solver"): fitted(solver="dopri5").steer(NEW, until=0.)


def test_levels_are_given_once(steerer):
    for kw in dict(), dict(until=1., nats=1.):
        with pytest.raises(ValueError, match="give the level as until="): steerer.stop_at(NEW, **kw)
    with pytest.raises(ValueError, match="one unit of strength"): steerer.steer(NEW, nats=1., T=1.)


# --- barriers given, gradients that vanish

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(D, 8), torch.nn.Linear(8, 1)
        for p in self.parameters(): p.data = torch.randn(p.shape, generator=g)
    def forward(self, a): return self.outer(torch.tanh(self.inner(a))).squeeze(-1)


def test_zero_gradient_is_no_motion():
    flat_for_some = ScoreBarrier(lambda a: torch.relu(a[..., 0]))
    x = NEW.clone()
    x[::2, 0], x[1::2, 0] = -9., 1.
    for kw in dict(), dict(solver="rk4"), dict(metric="covariance"):
        s = ods.ODESteer(barrier=flat_for_some, **kw).fit(POS, NEG)
        assert torch.equal(s.steer(x, 1.5)[::2], x[::2]) and (s.vector_field(x)[::2] == 0).all()
        assert ((s.steer(x, 1.5) - x)[1::2].norm(dim=-1) > 1).all()
    tiny = ods.ODESteer(barrier=LinearBarrier(torch.full((D,), 1e-30))).fit(POS, NEG)
    torch.testing.assert_close(tiny.vector_field(x).norm(dim=-1), torch.ones(len(x)))


def test_a_given_barrier_is_copied_not_touched():
    h = ScoreBarrier(Net())
    before = copy.deepcopy(h.state_dict())
    s = ods.ODESteer(barrier=h).fit(POS.double(), NEG.double())
    s.steer(NEW.double(), 1.0), s.steer(NEW, until=.5)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in h.state_dict().items())
    torch.testing.assert_close(s.vector_field(NEW), ascent(h.grad(NEW)))
    unfitted = ods.DensityRatioBarrier(ods.IdentityFeatures(), normalize=False)
    first, second = ods.ODESteer(barrier=unfitted).fit(POS, NEG), ods.ODESteer(barrier=unfitted).fit(NEG, POS)
    torch.testing.assert_close(first.vector_field(NEW), -second.vector_field(NEW), atol=1e-4, rtol=0)
    assert not hasattr(unfitted, "coef_")
    torch.testing.assert_close(first.fit(NEG, POS).vector_field(NEW), second.vector_field(NEW))  # a second fit starts anew


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_score_network_steers_where_gradients_are_off(mode, dtype):
    s = ods.ODESteer(barrier=ScoreBarrier(Net())).fit(POS, NEG)
    x = NEW.to(dtype)
    with mode(): y, z = s.steer(x, .5), s.steer(x, nats=.01)
    assert torch.equal(y, s.steer(x, .5)) and torch.equal(z, s.steer(x, nats=.01))  # a copy made in inference mode serves later, too
    assert not y.requires_grad and not s.stop_at(x, nats=.01).h.requires_grad


# --- choosing, saving, plumbing

def test_cv_chooses_by_groups_and_can_be_saved(tmp_path):
    groups = np.concatenate([np.arange(90) // 3, np.arange(70) // 3])
    s = ods.ODESteer(n_components=64, C="cv", gamma="cv").fit(POS, NEG, groups=groups)
    assert set(s.chosen) == {"C", "gamma", "held_out"} and s.barrier.features.gamma == s.chosen["gamma"] and s.barrier.C == s.chosen["C"]
    s.save_pretrained(tmp_path/"s")
    again = ods.load_steerer(tmp_path/"s")
    assert again.chosen == s.chosen and torch.equal(again.steer(NEW, 2.0), s.steer(NEW, 2.0)) and torch.equal(again.steer(NEW, nats=.1), s.steer(NEW, nats=.1))
    fixed = ods.ODESteer(n_components=64, C=s.chosen["C"], gamma=s.chosen["gamma"]).fit(POS, NEG)
    h = held_out_values([ods.DensityRatioBarrier(ods.PolynomialCountSketch(64, gamma=s.chosen["gamma"]), s.chosen["C"])], POS, NEG, groups)[0]
    assert s.chosen["held_out"] == {k: pytest.approx(getattr(quality(*h), k)) for k in ("auc", "log_loss", "slope")}
    assert torch.equal(fixed.steer(NEW, 2.0), s.steer(NEW, 2.0))


@pytest.mark.parametrize("kw", [dict(), dict(features="rff"), dict(features="linear"), dict(metric="covariance", power=.5, retract=True, solver="rk4", steps=3), dict(normalize=False, degree=3, max_T=2., seed=5), dict(coordinates="centred"), dict(coordinates="standardised", calibrate=True), dict(features="rff", coordinates="standardised", C="cv")], ids=str)
@pytest.mark.parametrize("cls", [ods.ODESteer, ods.StepODESteer])
@pytest.mark.filterwarnings("ignore:.*could not reach", "ignore:nats= and until=")
def test_save_and_load_is_bit_identical(tmp_path, kw, cls):
    if cls is ods.StepODESteer: kw = {k: v for k, v in kw.items() if k not in ("retract", "solver", "steps", "max_T")}
    s = fitted(cls, **kw)
    s.save_pretrained(tmp_path/"s")
    again = cls.from_pretrained(tmp_path/"s")
    assert type(again) is cls and again.params == s.params and again.chosen == s.chosen and again._wrong_scale() == s._wrong_scale()
    assert set(again.state_dict()) == set(s.state_dict())
    for units in dict(T=2.), dict(share=-.1), dict(spread=.3), dict(nats=.2), dict(until=0.): assert torch.equal(again.steer(NEW, **units), s.steer(NEW, **units))


def test_a_barrier_object_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="JSON"): ods.ODESteer(barrier=LinearBarrier(torch.ones(D))).fit(POS, NEG).save_pretrained(tmp_path/"s")


@pytest.mark.parametrize("coordinates", ["raw", "centred", "standardised"])
@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("cls", [ods.ODESteer, ods.StepODESteer])
def test_coordinates_and_calibration_move_copy_and_take_any_shape(coordinates, calibrate, cls):
    s, x = fitted(cls, coordinates=coordinates, calibrate=calibrate), NEW[:6]
    stored = {f"barrier.{k}" for k, of in (("shift_", "centred standardised"), ("scale_", "standardised")) if coordinates in of}
    assert {k for k in s.state_dict() if k.endswith(("shift_", "scale_"))} == stored
    wide = copy.deepcopy(s).double()
    assert all(v.dtype == torch.float64 for k, v in wide.barrier.state_dict().items() if v.is_floating_point())
    for units in dict(T=1.5), dict(nats=.5), dict(until=.3):
        gold = s.steer(x.double(), **units)
        torch.testing.assert_close(wide.steer(x.double(), **units), gold)
        torch.testing.assert_close(s.steer(x, **units).double(), gold, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(s.steer(x.reshape(2, 3, D), **units), s.steer(x, **units).reshape(2, 3, D))
        torch.testing.assert_close(s.steer(x[0], **units), s.steer(x, **units)[0], rtol=1e-4, atol=1e-4)
        assert s.steer(x.bfloat16(), **units).dtype == torch.bfloat16 and s.steer(x[:0], **units).shape == (0, D)
    assert torch.equal(copy.deepcopy(s).steer(x, 2.), s.steer(x, 2.)) and torch.equal(s.steer(x, 0.), x)
    torch.testing.assert_close(fitted(cls, torch.float64, coordinates=coordinates, calibrate=calibrate).steer(x.double(), 1.5), s.steer(x.double(), 1.5), rtol=1e-3, atol=1e-3)


# --- nats that are nats

@pytest.mark.parametrize("coordinates", ["raw", "centred", "standardised"])
def test_calibration_turns_no_path_and_moves_levels(coordinates):
    plain, mended = (fitted(C=.1, coordinates=coordinates, calibrate=c) for c in (False, True))
    for strength in dict(T=2.), dict(T=-1.), dict(share=.2): torch.testing.assert_close(mended.steer(NEW, **strength), plain.steer(NEW, **strength), rtol=1e-4, atol=1e-4)
    slope, h = mended.chosen["calibration"]["slope"], plain.barrier.value(NEW)
    assert slope > 3 and mended.chosen["held_out"]["slope"] == pytest.approx(1, abs=1e-6) and mended.chosen["held_out"]["log_loss"] < mended.chosen["calibration"]["log_loss"]
    torch.testing.assert_close(mended.barrier.value(NEW), slope * h + mended.chosen["calibration"]["intercept"], rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(mended.steer(NEW, nats=slope * .1), plain.steer(NEW, nats=.1), rtol=1e-3, atol=1e-3)


def gaussians(n, seed, d=64):
    "Two classes of one covariance, so that the true h is known, and rows of both; mean rise of the true h with steering"
    g = torch.Generator().manual_seed(75)
    mean, delta = 2 * torch.randn(d, generator=g), .35 * torch.randn(d, generator=g)
    truth, g = GaussianBarrier(mean + delta / 2, mean - delta / 2, torch.eye(d)), torch.Generator().manual_seed(seed)
    return truth, *(mean + s * delta / 2 + torch.randn(n, d, generator=g) for s in (1, -1))


@pytest.mark.filterwarnings("ignore:nats= and until=")
@pytest.mark.parametrize("kw", [dict(), dict(C=100.), dict(coordinates="centred"), dict(coordinates="standardised")], ids=str)
def test_a_calibrated_nat_is_a_nat_of_the_truth(kw):
    rise = {False: [], True: []}
    for seed in range(3):
        truth, pos, neg = gaussians(400, seed)
        new = gaussians(300, 10 + seed)[2]
        for calibrate in rise:
            stop = ods.ODESteer(n_components=1000, calibrate=calibrate, **kw).fit(pos, neg).stop_at(new, nats=1.)
            assert stop.reached.all()
            rise[calibrate].append((truth.value(stop.a) - truth.value(new)).mean().item())
    assert abs(np.mean(rise[True]) - 1) < .2
    if "C" not in kw: assert np.mean(rise[False]) > 3  # one nat of the published barrier is many


def said(s, **units):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2): s.steer(NEW_G, **units)
        s.stop_at(NEW_G, **units)
    return [str(w.message) for w in caught if "nats= and until=" in str(w.message)]


NEW_G = gaussians(20, 99)[2]


def test_levels_of_an_arbitrary_scale_are_doubted_once_and_only_there(tmp_path):
    _, pos, neg = gaussians(150, 0)
    make = lambda **kw: ods.ODESteer(**{"n_components": 1000, **kw}).fit(pos, neg)
    flat = make()
    with pytest.warns(UserWarning, match=r"times this h would be right even on the rows it was fitted on \(none were held out\); fit with calibrate=True or C='cv'") as caught: flat.steer(NEW_G, nats=.01)
    assert caught[0].filename == __file__ and not said(flat, nats=.01)
    flat.save_pretrained(tmp_path)
    assert len(said(ods.load_steerer(tmp_path), until=-9.)) == 1  # the card knows
    with pytest.warns(UserWarning, match="fit with calibrate") as caught: make().stop_at(NEW_G, nats=.01)
    assert caught[0].filename == __file__
    for units in dict(T=1.), dict(share=.1): assert said_of_distance(make(), units) == []
    for kw in dict(calibrate=True), dict(C="cv"), dict(C="cv", gamma="cv", calibrate=True), dict(C=100.), dict(features="linear", normalize=False), dict(coordinates="standardised", C=10.):
        assert said(make(**kw), nats=.01) == [], kw
    assert said(ods.ODESteer(barrier=flat.barrier).fit(pos, neg), nats=.01) == []  # nothing is known of a barrier that is given
    unfitted = ods.DensityRatioBarrier(ods.PolynomialCountSketch(300))
    assert len(said(ods.ODESteer(barrier=unfitted).fit(pos, neg), nats=.01)) == 1 and said(ods.ODESteer(barrier=unfitted, calibrate=True).fit(pos, neg), nats=.01) == []
    assert len(said(flat.fit(pos, neg), nats=.01)) == 1  # a second fit is a new barrier


def said_of_distance(s, units):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s.steer(NEW_G, **units)
    return [str(w.message) for w in caught]


def test_classes_that_nothing_tells_apart_are_doubted_whatever_the_calibration():
    g = torch.Generator().manual_seed(3)
    pos, neg = torch.randn(2, 60, 64, generator=g)
    for kw in dict(C="cv", calibrate=True), dict(C="cv"):
        message, = said(ods.ODESteer(n_components=200, **kw).fit(pos, neg), nats=.001)
        assert "hardly better than a coin on held-out rows" in message and message.endswith("steer by T= or share= (said once per steerer)")
    message, = said(ods.ODESteer(n_components=200, calibrate=True).fit(pos, neg), nats=.001)
    assert "fit with C='cv'" in message
    steep = ods.ODESteer(n_components=200).fit(pos, neg)
    steep.chosen = dict(held_out=dict(auc=.9, log_loss=.6, slope=.2))
    assert "0.2 times this h would be right on held-out rows; fit with calibrate=True or C='cv'" in said(steep, nats=.001)[0]


@pytest.mark.parametrize("d,n,gap", [(d, n, gap) for d in (32, 256) for n in (40, 150) for gap in (1., 2.5)])
def test_without_held_out_rows_only_barriers_that_are_wrong_are_doubted(d, n, gap):
    "The fitted rows flatter a barrier: what they doubt is doubtful on new rows, too"
    g = torch.Generator().manual_seed(d + n)
    way, common = (torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0) for _ in range(2))
    draw = lambda n: [torch.randn(n, d, generator=g) + 3 * d**.5 * common + s * gap / 2 * way for s in (1, -1)]
    (pos, neg), new = draw(n), draw(800)
    doubted = 0
    for kw in [dict(C=C, gamma=gamma) for C in (1., 100., 1e4) for gamma in (.1, 1.)]:
        s = ods.ODESteer(n_components=1000, **kw).fit(pos, neg)
        if s._wrong_scale() is None: continue
        doubted += 1
        q = barrier_quality(s.barrier, *new)
        assert q.slope > 5 or q.log_loss > .65, (kw, q)
    assert doubted >= 1  # the published setting


class NoHostSync(TorchDispatchMode):
    "Fails where the host would have to wait for the device, or copies between them"
    WAITS = "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        if name in ("index", "index_put_"): assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kw", [dict(), dict(degree=3), dict(metric="covariance", retract=True), dict(features="rff"), dict(features="linear", normalize=False, solver="rk4"), dict(coordinates="centred", n_components=4), dict(coordinates="standardised", calibrate=True)], ids=str)
def test_plain_steering_never_waits_for_the_device(kw):
    s, T = fitted(**kw), torch.tensor(1.5)
    rows = torch.linspace(0, 2, len(NEW))
    s.steer(NEW, 1.)  # the first call prepares the route
    with NoHostSync():
        s.steer(NEW.bfloat16(), T), s.steer(NEW, rows), s.steer(NEW, 2.0), s.steer(NEW, share=.2)
        s.stop_at(NEW, until=0.5), s.stop_at(NEW, nats=rows), s.stop_at(NEW, until=T, T=rows)
    with pytest.raises(AssertionError, match="waits"), NoHostSync(): (rows > 1).any().item()  # the check itself works


@pytest.mark.parametrize("kw,error,message", [
    (dict(metric="manhattan"), ValueError, "metric must be one of euclidean, covariance"),
    (dict(features="mlp"), ValueError, "features must be one of count-sketch, rff, linear"),
    (dict(steps=0), ValueError, "steps must be a positive integer; got 0"),
    (dict(steps=2.5), ValueError, "steps must be a positive integer; got 2.5"),
    (dict(power=1.5), ValueError, r"power must lie in \[0, 1\]; got 1.5"),
    (dict(max_T=0), ValueError, "max_T must be positive"),
    (dict(solver="rk45"), ValueError, "unknown solver 'rk45': fixed-step euler, midpoint, rk4; adaptive dopri5"),
    (dict(solver="dopri5", retract=True), ValueError, "retract needs a fixed-step solver"),
    (dict(C=0), ValueError, "C must be a positive number or 'cv'; got 0"),
    (dict(C="auto"), ValueError, "C must be a positive number or 'cv'; got 'auto'"),
    (dict(gamma=-1.), ValueError, "gamma must be a positive number or 'cv'"),
    (dict(gamma="cv", features="rff"), ValueError, "gamma='cv' does nothing for features='rff'"),
    (dict(coordinates="whitened"), ValueError, "coordinates must be one of raw, centred, standardised; got 'whitened'"),
    (dict(calibrate="yes"), ValueError, "calibrate must be one of True, False; got 'yes'"),
    (dict(barrier=LinearBarrier(torch.ones(D)), calibrate=True), ValueError, "leave barrier= out, or give a DensityRatioBarrier that is not fitted yet"),
    (dict(barrier=LinearBarrier(torch.ones(D)), coordinates="centred"), ValueError, "a barrier that is given has its own coordinates"),
    (dict(barrier=len), TypeError, r"wrap a differentiable score in ScoreBarrier"),
], ids=str)
def test_bad_hyper_parameters(kw, error, message):
    with pytest.raises(error, match=message): ods.ODESteer(**kw)


@pytest.mark.parametrize("kw,message", [(dict(steps=0), "steps must be a positive integer"), (dict(solver="leapfrog"), "unknown solver 'leapfrog'"), (dict(T=torch.ones(3)), "T must be a number or have one value per row")])
def test_bad_calls_of_integrate(kw, message):
    with pytest.raises(ValueError, match=message): integrate(turn, torch.zeros(2, 2, dtype=torch.float64), **{"T": 1.0, **kw})


def test_a_step_function_can_be_retracted():
    from odesteer.ode import euler
    pos, neg = (torch.randn(20, 8, generator=torch.Generator().manual_seed(s)) + s for s in (1, 0))
    named, given = (ods.ODESteer(n_components=64, solver=s, retract=True).fit(pos, neg).steer(neg, 1.0) for s in ("euler", euler))
    assert torch.equal(named, given)
