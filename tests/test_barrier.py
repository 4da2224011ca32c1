"Barriers: values and gradients against independent float64 computations, what they imply for each steerer, and the certificate"
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

import odesteer as ods
from odesteer.barrier import AllOf, Barrier, GaussianBarrier, LinearBarrier, ScoreBarrier, ascent, certificate, common_ascent, implied_barrier

D = 5
quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, d=D): A = normal(d, d, seed=seed); return A @ A.T + .3 * torch.eye(d)


class Waves(Barrier):
    "A subclass that only knows its value"
    def value(self, a): return a.sin().sum(-1) * (1 + a[..., 0]**2)


class Network(torch.nn.Sequential):
    "A reward head: one number per activation"
    def __init__(self): super().__init__(torch.nn.Linear(D, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    def forward(self, a): return super().forward(a).squeeze(-1)


def network():
    net = Network().to(torch.float64)
    for i, p in enumerate(net.parameters()): p.data = normal(*p.shape, seed=i)
    return net


BARRIERS = {
    "linear": lambda: LinearBarrier(normal(D, seed=1), .7),
    "gaussian-identity": lambda: GaussianBarrier(normal(D, seed=1), normal(D, seed=2)),
    "gaussian-shared": lambda: GaussianBarrier(normal(D, seed=1), normal(D, seed=2), covariance(3)),
    "gaussian-separate": lambda: GaussianBarrier(normal(D, seed=1), normal(D, seed=2), covariance(3), covariance(4)),
    "gaussian-identity-positives": lambda: GaussianBarrier(normal(D, seed=1), normal(D, seed=2), None, covariance(4)),
    "score": lambda: ScoreBarrier(network(), .2),
    "subclass": Waves,
}
every_barrier = pytest.mark.parametrize("make", BARRIERS.values(), ids=BARRIERS)


# ---------------------------------------------------------------- values and gradients

@every_barrier
def test_gradient_is_the_slope_of_the_value(make):
    h, a, eps = make(), normal(4, D, seed=9), 1e-5
    slopes = torch.stack([(h.value(a + eps * e) - h.value(a - eps * e)) / (2 * eps) for e in torch.eye(D).double()], -1)
    torch.testing.assert_close(h.grad(a), slopes, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(h.grad(a), Barrier.grad(h, a), rtol=1e-12, atol=1e-12)  # closed form = autograd


@every_barrier
def test_any_leading_shape_and_one_row_alone(make):
    h, a = make(), normal(2, 3, D, seed=8)
    assert h.value(a).shape == (2, 3) and h.grad(a).shape == (2, 3, D)
    assert h.value(a[:0]).shape == (0, 3) and h.grad(a[:0]).shape == (0, 3, D)
    torch.testing.assert_close(h.value(a[1, 2]), h.value(a)[1, 2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h.grad(a[1, 2]), h.grad(a)[1, 2], rtol=1e-12, atol=1e-12)


@every_barrier
def test_gradients_work_where_nothing_is_recorded_and_touch_nothing(make):
    h, a = make(), normal(4, D, seed=7)
    before, expected = a.clone(), h.grad(a)
    for quiet in torch.no_grad, torch.inference_mode:
        with quiet(): g = h.grad(a.clone())
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)
    leaf = a.clone().requires_grad_(True)
    h.grad(leaf)
    assert leaf.grad is None and torch.equal(a, before) and all(p.grad is None for p in h.parameters())


@every_barrier
def test_float32_agrees_with_float64(make):
    exact, a = make(), 3 * normal(50, D, seed=6)
    h = make().float()
    h_exact = exact.value(a)
    assert (h.value(a.float()).double() - h_exact).abs().max() <= 1e-5 * max(1, h_exact.abs().max())
    g, g_exact = h.grad(a.float()).double(), exact.grad(a)
    assert ((g - g_exact).norm(dim=-1) <= 1e-5 * g_exact.norm(dim=-1).clamp_min(1)).all()


@pytest.mark.parametrize("name", [k for k in BARRIERS if k not in ("score", "subclass")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_maths_are_in_float32_or_better_whatever_the_activations(name, dtype):
    h, a = BARRIERS[name]().float(), normal(4, D, seed=6).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for f in h.value, h.grad:
        assert f(a).dtype == wide
        torch.testing.assert_close(f(a), f(a.double()).to(wide), rtol=1e-5, atol=1e-5)


@every_barrier
def test_tables_survive_a_state_dict(make):
    h, other, a = make(), make(), normal(4, D, seed=5)
    for x in (*other.buffers(), *other.parameters()): x.data = torch.zeros_like(x)
    other.load_state_dict(h.state_dict())
    assert torch.equal(other.value(a), h.value(a))


def test_a_value_that_autograd_cannot_follow_is_named():
    for score in (lambda a: a.detach().sum(-1), lambda a: torch.from_numpy(a.detach().numpy().sum(-1)), lambda a: torch.ones(len(a), requires_grad=True)):
        with pytest.raises(ValueError, match="no gradient reaches the activation through ScoreBarrier.value.*without .detach"): ScoreBarrier(score).grad(normal(3, D))


# ---------------------------------------------------------------- linear and Gaussian

def test_linear_takes_lists_arrays_and_tensors():
    a, expected = normal(6, 3), normal(6, 3) @ torch.tensor([1., -2., 3.]).double() + 4
    for w in [1., -2., 3.], [1, -2, 3], np.array([1., -2., 3.]), torch.tensor([1., -2., 3.]):
        torch.testing.assert_close(LinearBarrier(w, 4).double().value(a), expected)


@pytest.mark.parametrize("w, b, message", [
    (torch.ones(2, 3), 0., r"w must have 1 dimension; got shape \(2, 3\)"),
    ([1., float("nan")], 0., "w holds NaN or infinity"),
    ([1., 2.], float("inf"), "b holds NaN or infinity"),
    ([1., 2.], [1., 2.], r"b must have 0 dimensions; got shape \(2,\)"),
])
def test_linear_refuses(w, b, message):
    with pytest.raises(ValueError, match=message): LinearBarrier(w, b)


@quick
@given(seeds, st.integers(1, 8), st.booleans(), st.booleans())
def test_gaussian_is_the_log_ratio_of_scipys_densities(seed, d, with_pos, with_neg):
    mean_pos, mean_neg, a = normal(d, seed=seed), normal(d, seed=seed + 1), 2 * normal(7, d, seed=seed + 2)
    cov_pos = covariance(seed + 3, d) if with_pos else None
    cov_neg = covariance(seed + 4, d) if with_neg else None
    C_pos = torch.eye(d) if cov_pos is None else cov_pos
    C_neg = C_pos if cov_neg is None else cov_neg
    expected = multivariate_normal(mean_pos, C_pos).logpdf(a) - multivariate_normal(mean_neg, C_neg).logpdf(a)
    torch.testing.assert_close(GaussianBarrier(mean_pos, mean_neg, cov_pos, cov_neg).value(a), torch.as_tensor(expected).reshape(7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [True, False], ids=["LDA", "QDA"])
def test_gaussian_is_scikit_learns_discriminant(shared):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
    pos, neg = normal(80, D, seed=1) + .5, normal(50, D, seed=2) @ covariance(3) - .5
    X, y = torch.cat([pos, neg]).numpy(), np.repeat([1, 0], [80, 50])
    if shared:
        within = np.cov(np.concatenate([pos - pos.mean(0), neg - neg.mean(0)]).T, bias=True)
        judge = LinearDiscriminantAnalysis(solver="lsqr", priors=[.5, .5], covariance_estimator=type("Within", (), {"fit": lambda s, X: setattr(s, "covariance_", within) or s})())
        h = GaussianBarrier(pos.mean(0), neg.mean(0), within)
    else:
        judge = QuadraticDiscriminantAnalysis(priors=[.5, .5], store_covariance=True).fit(X, y)
        h = GaussianBarrier(pos.mean(0), neg.mean(0), judge.covariance_[1], judge.covariance_[0])
    expected = judge.fit(X, y).decision_function(X)
    np.testing.assert_allclose(h.value(torch.as_tensor(X)), expected, rtol=1e-9, atol=1e-9)


def test_wide_float32_activations_keep_their_digits():
    a, m = 20 * normal(50, 2048, seed=1) + 5, normal(2048, seed=2) + 5
    shift = .1 * normal(2048, seed=3)
    exact = GaussianBarrier(m + shift, m).value(a)
    h = GaussianBarrier((m + shift).float(), m.float()).value(a.float()).double()
    reference = ((a - m.float().double())**2 - (a - (m + shift).float().double())**2).sum(-1) / 2
    assert (h - reference).abs().max() <= 1e-5 * max(1, exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_of_very_different_size_are_no_singular_covariance(dtype):
    scale = torch.tensor([1e-4, 1., 1e4]).double()
    a, m = scale * normal(20, 3), scale * torch.tensor([1., 0., 2.])
    expected = sum(multivariate_normal(m[i], scale[i]**2).logpdf(a[:, i]) - multivariate_normal(0, 4 * scale[i]**2).logpdf(a[:, i]) for i in range(3))
    C = scale.square().diag().to(dtype)
    np.testing.assert_allclose(GaussianBarrier(m.to(dtype), 0 * m.to(dtype), C, 4 * C).value(a.to(dtype)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("args, message", [
    ((torch.zeros(3), torch.zeros(4)), "mean_pos has width 3 but mean_neg has width 4"),
    ((torch.zeros(2, 3), torch.zeros(3)), "mean_pos must have 1 dimension"),
    ((torch.full((3,), float("nan")), torch.zeros(3)), "mean_pos holds NaN"),
    ((torch.zeros(3), torch.ones(3), torch.eye(2)), r"cov_pos must have shape \(3, 3\)"),
    ((torch.zeros(3), torch.ones(3), torch.zeros(3, 3)), "cov_pos is not symmetric positive definite.*shrink it"),
    ((torch.zeros(3), torch.ones(3), torch.eye(3), torch.eye(3) + torch.triu(torch.ones(3, 3), 1)), "cov_neg is not symmetric"),
    ((torch.zeros(3), torch.ones(3), torch.cov(normal(3, 3))), "cov_pos is not symmetric positive definite"),
])
def test_gaussian_refuses(args, message):
    with pytest.raises(ValueError, match=message): GaussianBarrier(*args)


# ---------------------------------------------------------------- scores

def test_score_is_shifted_by_its_threshold_and_moves_with_its_module():
    net, a = network(), normal(4, D)
    h = ScoreBarrier(net, .2)
    torch.testing.assert_close(h.value(a), net(a) - .2)
    assert h.float().value(a.float()).dtype == torch.float32
    assert ScoreBarrier(lambda a: a.square().sum(-1), 4.).grad(a).equal(2 * a)


@pytest.mark.parametrize("score, message", [
    (lambda a: a[:, :1], r"one number per activation: for \(4, 5\) expected \(4,\), got \(4, 1\).*squeeze"),
    (lambda a: a.sum(), r"expected \(4,\), got \(\)"),
])
def test_score_of_the_wrong_shape(score, message):
    with pytest.raises(ValueError, match=message): ScoreBarrier(score).value(normal(4, D))


def test_score_must_be_callable():
    with pytest.raises(TypeError, match="score must be a function or module.*got Tensor"): ScoreBarrier(torch.ones(D))


# ---------------------------------------------------------------- steepest ascent

@quick
@given(seeds, st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]), st.floats(-30, 30))
def test_ascent_has_unit_length_at_every_scale(seed, d, dtype, exponent):
    g = normal(6, d, seed=seed)
    v = ascent((g * 10**exponent).to(dtype))
    torch.testing.assert_close(v.double(), g / g.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_no_gradient_means_no_motion():
    assert torch.equal(ascent(torch.zeros(3, D)), torch.zeros(3, D))
    disc = ScoreBarrier(lambda a: 1 - a.square().sum(-1))
    assert torch.equal(ascent(disc.grad(torch.zeros(1, D))), torch.zeros(1, D))


@every_barrier
def test_small_steps_of_ascent_raise_h_at_the_rate_of_the_gradients_length(make):
    h, a, dt = make(), 2 * normal(60, D, seed=4), 1e-5
    rate = (h.value(a + dt * ascent(h.grad(a))) - h.value(a)) / dt
    torch.testing.assert_close(rate, h.grad(a).norm(dim=-1), rtol=1e-3, atol=1e-3)
    assert (rate > 0).all()


# ---------------------------------------------------------------- what a steerer implies

def clouds(dtype=torch.float64): return (normal(40, D, seed=1) + .8).to(dtype), (1.5 * normal(100, D, seed=2) - .4).to(dtype)


@pytest.mark.parametrize("name", ["caa", "iti", "repe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_fields_climb_their_barrier(name, dtype):
    pos, neg = clouds(dtype)
    pairs = {"pairs": np.stack([np.arange(40)] * 2, 1)} if name == "repe" else {}
    steerer = ods.make_steerer(name).fit(pos, neg, **pairs)
    h, v = implied_barrier(steerer), steerer.vector_field(neg)
    g = h.grad(neg)
    assert h.value(neg).dtype == dtype
    torch.testing.assert_close(ascent(g), ascent(v), rtol=1e-5, atol=1e-5)
    T = torch.linspace(-1, 3, len(neg), dtype=dtype)
    torch.testing.assert_close(h.value(steerer.steer(neg, T=T)), h.value(neg) + T * (g * v).sum(-1), rtol=1e-4, atol=1e-4)
    assert h.value(pos).mean() > h.value(neg).mean()


def test_caa_implies_the_ratio_of_unit_gaussians():
    pos, neg = clouds()
    h = implied_barrier(ods.CAA().fit(pos, neg))
    expected = multivariate_normal(pos.mean(0), np.eye(D)).logpdf(neg) - multivariate_normal(neg.mean(0), np.eye(D)).logpdf(neg)
    np.testing.assert_allclose(h.value(neg), expected, rtol=1e-9, atol=1e-9)


def test_iti_implies_the_logit_without_the_class_prior():
    from sklearn.linear_model import LogisticRegression
    pos, neg = clouds()
    X = torch.cat([pos, neg]).numpy()
    probe = LogisticRegression(C=1., tol=1e-12, max_iter=10_000).fit(X, np.repeat([1, 0], [len(pos), len(neg)]))
    h = implied_barrier(ods.ITI(C=1.).fit(pos, neg))
    np.testing.assert_allclose(h.value(torch.as_tensor(X)), probe.decision_function(X) + np.log(100 / 40), rtol=1e-5, atol=1e-5)


def test_repe_implies_zero_halfway_between_the_means():
    pos, neg = clouds()
    h = implied_barrier(ods.RepE().fit(pos, neg, pairs=[[i, i] for i in range(40)]))
    assert h.value((pos.mean(0) + neg.mean(0)) / 2).abs() < 1e-12


def test_a_steerer_that_carries_its_barrier_answers_with_it():
    steerer = ods.ODESteer(n_components=64).fit(*clouds())
    assert implied_barrier(steerer) is steerer.barrier


def test_implied_barrier_refuses():
    class Still(ods.Steerer):
        def _fit(self, data): pass
        def _field(self, x): return torch.zeros_like(x)
    with pytest.raises(RuntimeError, match="this ITI is not fitted: call .fit"): implied_barrier(ods.ITI())
    with pytest.raises(TypeError, match="Still climbs no barrier"): implied_barrier(Still().fit(*clouds()))
    with pytest.raises(TypeError, match="expected a fitted steerer; got Linear"): implied_barrier(torch.nn.Linear(2, 2))


# ---------------------------------------------------------------- the certificate

@quick
@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=2, max_size=8), st.floats(0, 2))
def test_certificate_counts_what_a_loop_counts(rows, tol):
    h = torch.tensor(rows, dtype=torch.float64)
    cert = certificate(LinearBarrier(torch.ones(1).double()), h[..., None], tol=tol)
    drops = [[max(0., a - b) for a, b in zip(col, col[1:])] for col in zip(*rows)]
    assert torch.equal(cert.h, h)
    assert cert.worst_drop == max(map(max, drops))
    assert cert.share_monotone == pytest.approx(sum(max(d) <= tol for d in drops) / 3)
    assert cert.share_risen == pytest.approx(sum(col[-1] > col[0] for col in zip(*rows)) / 3)


def test_certificate_takes_one_row_or_many_dimensions_and_keeps_no_graph():
    h, path = ScoreBarrier(network()), normal(6, 2, 3, D)
    cert = certificate(h, path)
    assert cert.h.shape == (6, 2, 3) and not cert.h.requires_grad
    assert certificate(h, path[:, 0, 0]).h.shape == (6,)
    assert repr(certificate(LinearBarrier([1.]), torch.tensor([[0.], [2.], [1.5]]))) == "rows: 1, steps: 2; h rose in 100.0%, never fell in 0.0%, worst drop 0.5"


@pytest.mark.parametrize("tol, said", [(0, "never fell in 0.0%"), (.4, "never fell by more than 0.4 in 0.0%"), (.5, "never fell by more than 0.5 in 100.0%"), (1e-9, "never fell by more than 1e-09 in 0.0%")])
def test_certificate_says_which_fall_it_let_pass(tol, said):
    cert = certificate(LinearBarrier([1.]), torch.tensor([[0.], [2.], [1.5]]), tol=tol)
    assert cert.tol == tol and said in repr(cert) and "worst drop 0.5" in repr(cert)


def test_certificate_never_calls_nan_monotone():
    cert = certificate(LinearBarrier([1.]), torch.tensor([[[0.]], [[float("nan")]], [[1.]]]))
    assert np.isnan(cert.worst_drop) and cert.share_monotone == 0


def test_certificate_needs_a_step():
    for path in torch.zeros(1, 4, D), torch.zeros(D):
        with pytest.raises(ValueError, match="a path needs its start and at least one step"): certificate(LinearBarrier(torch.ones(D)), path)


def test_desired_set_is_left_by_no_exact_trajectory_but_by_large_steps():
    h = GaussianBarrier(torch.zeros(2).double(), torch.zeros(2).double(), torch.eye(2), 4 * torch.eye(2))  # desired: a disc of radius 1.92
    a = 2 * normal(200, 2, seed=3)
    def walk(dt, steps):
        path = [a]
        for _ in range(steps): path.append(path[-1] + dt * ascent(h.grad(path[-1])))
        return torch.stack(path)
    inside = h.value(walk(.01, 800)) >= 0
    assert (inside[1:] >= inside[:-1]).all() and inside[-1].all()
    cert = certificate(h, walk(4., 5))
    assert cert.share_monotone < .5 and ((cert.h[0] >= 0) & (cert.h[1] < 0)).any()


# ---------------------------------------------------------------- several barriers at once

def least_norm(g):
    "Independent: SciPy's SLSQP on the shortest w with u_i . w >= 1, or None where there is none"
    from scipy.optimize import minimize
    u = (g / g.norm(dim=-1, keepdim=True)).numpy()
    found = minimize(lambda w: w @ w, u.sum(0), jac=lambda w: 2 * w, constraints={"type": "ineq", "fun": lambda w: u @ w - 1, "jac": lambda w: u}, method="SLSQP", options=dict(ftol=1e-14, maxiter=500))
    return torch.as_tensor(found.x) if found.status in (0, 8) and (u @ found.x > 1 - 1e-6).all() else None  # 8: what older SciPy says at the optimum


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 9))
def test_common_ascent_is_the_shortest_that_raises_all(seed, K, d):
    g = normal(K, d, seed=seed) * 10**normal(K, 1, seed=seed + 1) + normal(d, seed=seed + 2)
    (p, exists), w = common_ascent(g), least_norm(g)
    if p.norm() > .02 or (w is not None and w.norm() < 50): torch.testing.assert_close(p / p.norm()**2, w, rtol=1e-4, atol=1e-4)  # elsewhere SLSQP is not exact
    assert exists == (p != 0).any()
    rates = ascent(g) @ ascent(p)
    assert not exists or (rates >= p.norm() - 1e-7).all()


@quick
@given(seeds, st.integers(1, 6))
def test_common_ascent_promises_the_slowest_as_much_as_any_direction_can(seed, K):
    g, angle = normal(K, 2, seed=seed), torch.arange(0, 2 * np.pi, 1e-4).double()
    best = (ascent(g) @ torch.stack([angle.cos(), angle.sin()])).amin(0).max()
    p, exists = common_ascent(g)
    if best > 2e-3: torch.testing.assert_close(p.norm(), best, rtol=0, atol=1e-4)  # the grid is that coarse
    if best < 0: assert not exists and not p.any()


@quick
@given(seeds, st.integers(2, 6), st.sampled_from([torch.float32, torch.float64]))
def test_common_ascent_of_the_same_of_nearly_the_same_and_of_opposites(seed, K, dtype):
    g = normal(3, 7, seed=seed).to(dtype)
    near = g[:, None] * (1 + normal(3, K, 1, seed=seed + 1).abs().to(dtype)) + 1e-6 * normal(3, K, 7, seed=seed + 2).to(dtype)
    p, exists = common_ascent(near)
    assert exists.all() and p.dtype == dtype
    torch.testing.assert_close(p, ascent(g), rtol=1e-4, atol=1e-4)
    p, exists = common_ascent(torch.cat([near, -near[:, :1]], 1)[:, -6:])
    assert not exists.any() and not p.any()


def test_common_ascent_knows_rows_and_shapes():
    g = normal(2, 3, 4, D, seed=1)
    p, exists = common_ascent(g)
    assert p.shape == (2, 3, D) and exists.shape == (2, 3)
    torch.testing.assert_close(p[1, 2], common_ascent(g[1, 2])[0], rtol=1e-12, atol=1e-12)
    p, exists = common_ascent(g[:0])
    assert p.shape == (0, 3, D) and exists.shape == (0, 3)
    p, exists = common_ascent(torch.cat([g[0, :, :2], torch.zeros(3, 1, D)], 1))  # one barrier is at its top
    assert not exists.any() and not p.any()


ALL = {name: [make() for name, make in BARRIERS.items() if name in names] for name, names in
       {"two": ("linear", "gaussian-separate"), "three": ("linear", "score", "gaussian-shared"), "one": ("score",)}.items()}


@pytest.mark.parametrize("parts", ALL.values(), ids=ALL)
def test_all_of_is_the_least_value_and_small_steps_raise_every_part(parts):
    h, a, dt = AllOf(*parts), normal(60, D, seed=4), 1e-5
    assert torch.equal(h.value(a), torch.stack([part.value(a) for part in parts]).min(0).values)
    p = h.grad(a)
    goes = p.norm(dim=-1) > 0
    assert goes.double().mean() > .9
    for part in parts:
        rate = (part.value(a + dt * ascent(p)) - part.value(a)) / dt
        assert (rate[goes] >= (p.norm(dim=-1) * part.grad(a).norm(dim=-1))[goes] - 1e-3).all()
    torch.testing.assert_close(h.value(a[0]), h.value(a)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h.grad(a[0]), p[0], rtol=1e-12, atol=1e-12)


def test_all_of_one_climbs_that_one():
    score, a = ScoreBarrier(network()), normal(20, D)
    torch.testing.assert_close(AllOf(score).grad(a), ascent(score.grad(a)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_of_thinks_in_float32_or_better(dtype):
    h = AllOf(*(BARRIERS[k]().float() for k in ("linear", "gaussian-separate")))
    a, wide = normal(4, D, seed=6).to(dtype), torch.promote_types(dtype, torch.float32)
    for f in h.value, h.grad:
        assert f(a).dtype == wide
        torch.testing.assert_close(f(a), f(a.double()).to(wide), rtol=1e-5, atol=1e-5)


def test_odesteer_climbs_all_of_them():
    pos, neg = clouds()
    parts = LinearBarrier(pos.mean(0) - neg.mean(0)), GaussianBarrier(pos.mean(0), neg.mean(0), covariance(3), covariance(4))
    steerer = ods.ODESteer(barrier=AllOf(*parts), steps=50).fit(pos, neg)
    path = steerer.trajectory(neg, T=.5)
    for part in (*parts, steerer.barrier): assert certificate(part, path, tol=1e-3).share_risen > .9
    alone = ods.ODESteer(barrier=parts[0], steps=50).fit(pos, neg).trajectory(neg, T=.5)
    assert certificate(parts[1], alone).share_risen < certificate(parts[1], path).share_risen
    with pytest.raises(ValueError, match="JSON"): steerer.save_pretrained("never")


def test_all_of_refuses_with_the_reason():
    pos, neg = clouds()
    w, flat = torch.ones(D), ScoreBarrier(lambda a: 0 * a.sum(-1))
    def fit(*parts, **kw): return ods.ODESteer(barrier=AllOf(*parts), **kw).fit(pos, neg)
    with pytest.raises(ValueError, match=r"no direction raises all 3 barriers in 100 of these 100 activations; barrier 0 \(LinearBarrier\) and barrier 2 \(LinearBarrier\) pull against each other in 100% of them"):
        fit(LinearBarrier(w), BARRIERS["gaussian-identity"](), LinearBarrier(-w, 3.))
    with pytest.raises(ValueError, match=r"barrier 1 \(ScoreBarrier\) has no gradient in 100% of them"): fit(LinearBarrier(w), flat)
    e = torch.eye(D)
    with pytest.raises(ValueError, match=r"barrier 0 \(LinearBarrier\), barrier 1 \(LinearBarrier\) and barrier 2 \(LinearBarrier\) pull"): fit(*map(LinearBarrier, (e[0], e[1], -e[0] - e[1])))
    half = ScoreBarrier(lambda a: (a - neg[:30].mean()).clamp_max(1e9).mul(torch.where(a[..., :1] > neg[:, 0].quantile(.6), -1., 1.)).sum(-1))
    fit(LinearBarrier(w), half)  # in a minority of places only: these stand still
    for kw in dict(metric="covariance"), dict(retract=True):
        with pytest.raises(ValueError, match="AllOf raises every barrier along its own direction"): fit(LinearBarrier(w), **kw)
    with pytest.raises(ValueError, match="one to six barriers; got 0"): AllOf()
    with pytest.raises(ValueError, match="one to six barriers; got 7"): AllOf(*[flat] * 7)
    with pytest.raises(TypeError, match=r"AllOf takes barriers; got function: wrap"): AllOf(flat, lambda a: a)
