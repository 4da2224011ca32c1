"Feature maps, the density-ratio barrier and its quality, against independent float64 computations."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.kernel_approximation import PolynomialCountSketch as SklearnSketch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from odesteer.barrier import Barrier, GaussianBarrier
from odesteer.density import (DensityRatioBarrier, IdentityFeatures, PolynomialCountSketch, RandomFourierFeatures, Streamed,
                              _conjugate_gradients, barrier_quality, choose, grouped_folds, held_out_values, logistic_newton, platt, quality)
from odesteer.euler import logistic_regression

COORDINATES = "raw", "centred", "standardised"
SHAPES = list(itertools.product((1, 2, 3, 4), (16, 17), (1.0, 0.0)))  # degree, width, constant


def reference_sketch(x, index, bit, gamma, coef0, n):
    "The sketch of one vector in float64 by bucket loops and circular convolution: no FFT."
    z = np.sqrt(gamma) * np.asarray(x, dtype=np.float64)
    if coef0: z = np.append(z, np.sqrt(coef0))
    product = None
    for h, s in zip(np.asarray(index), np.asarray(bit, dtype=np.float64)):
        sketch = np.zeros(n)
        np.add.at(sketch, h, s * z)
        product = sketch if product is None else sum(sketch[k] * np.roll(product, k) for k in range(n))
    return product


def rows(seed, n=300, d=24, offset=20.0, shift=1.5):
    "Activation-like rows: a large common part, class means a little apart."
    g = torch.Generator().manual_seed(seed)
    common = offset * torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    direction = shift * torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    return torch.randn(n, d, generator=g) + common + direction, torch.randn(n - 100, d, generator=g) + common - direction


def float64_h(barrier, a):
    "h from the fitted tables alone, in float64, by scikit-learn's transform of the same tables."
    f = barrier.features
    a = a.double().numpy()
    if barrier.coordinates != "raw": a = a - barrier.shift_.double().numpy()
    if barrier.coordinates == "standardised": a = a * barrier.scale_.double().numpy()
    u = a / np.linalg.norm(a, axis=1, keepdims=True) if barrier.normalize else a
    ref = SklearnSketch(n_components=f.n_components, degree=f.degree, gamma=f.gamma, coef0=f.coef0).fit(u)
    ref.indexHash_, ref.bitHash_ = f.indexHash_.numpy(), f.bitHash_.numpy()
    return torch.tensor(ref.transform(u)) @ barrier.coef_.double() + barrier.intercept_.double() + barrier.log_prior_.double()


# ---- count sketch ----

@settings(max_examples=40, deadline=None)
@given(degree=st.integers(1, 4), n=st.integers(1, 12), d=st.integers(1, 6), coef0=st.sampled_from([0.0, 1.0, 2.5]),
       gamma=st.floats(0.05, 3.0), seed=st.integers(0, 10**6))
def test_sketch_is_the_convolution_of_count_sketches(degree, n, d, coef0, gamma, seed):
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = PolynomialCountSketch(n, degree, gamma, coef0).fit(x, seed)
    expected = np.stack([reference_sketch(r, f.indexHash_, f.bitHash_, gamma, coef0, n) for r in x.numpy()])
    torch.testing.assert_close(f(x), torch.tensor(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degree,n,coef0", SHAPES)
def test_sketch_equals_scikit_learn_with_its_tables(degree, n, coef0):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = SklearnSketch(n_components=n, degree=degree, gamma=0.7, coef0=coef0, random_state=1).fit(x.numpy())
    ours = PolynomialCountSketch(n, degree, 0.7, coef0, theirs.indexHash_, theirs.bitHash_).fit(x)
    torch.testing.assert_close(ours(x), torch.tensor(theirs.transform(x.numpy())), rtol=1e-12, atol=1e-12)
    assert np.array_equal(ours.indexHash_.numpy(), theirs.indexHash_) and np.array_equal(ours.bitHash_.numpy(), theirs.bitHash_)


@pytest.mark.parametrize("degree,n,coef0", SHAPES)
def test_vjp_is_exact(degree, n, coef0):
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(2, 3, 9, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    f = PolynomialCountSketch(n, degree, 0.7, coef0).fit(x)
    a = x.clone().requires_grad_(True)
    torch.testing.assert_close(f.vjp(x, w), torch.autograd.grad((f(a) @ w).sum(), a)[0], rtol=1e-10, atol=1e-10)
    J = torch.func.jacrev(f)(x[0, 0])
    torch.testing.assert_close(f.vjp(x[0, 0], w), J.T @ w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(f.vjp(x.float(), w.float()).double(), f.vjp(x, w), rtol=1e-5, atol=1e-4)


def test_vjp_where_a_spectrum_is_zero():
    f = PolynomialCountSketch(8, degree=3, coef0=0.0).fit(torch.zeros(1, 4))
    assert torch.equal(f.vjp(torch.zeros(2, 4), torch.ones(8)), torch.zeros(2, 4))


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_batched_equals_single(degree):
    x = torch.randn(5, 3, 11, generator=torch.Generator().manual_seed(3))
    w = torch.randn(33, generator=torch.Generator().manual_seed(4))
    f = PolynomialCountSketch(33, degree).fit(x)
    one = torch.stack([torch.stack([f(r) for r in block]) for block in x])
    torch.testing.assert_close(f(x), one)
    torch.testing.assert_close(f.vjp(x, w), torch.stack([torch.stack([f.vjp(r, w) for r in block]) for block in x]))
    assert f(x[:0]).shape == (0, 3, 33) and f.vjp(x[:0], w).shape == (0, 3, 11)


def test_without_constant_the_sketch_is_homogeneous():
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for degree in (1, 2, 3, 4):
        f = PolynomialCountSketch(32, degree, coef0=0.0).fit(x)
        assert f.indexHash_.shape == (degree, 6)
        torch.testing.assert_close(f(-1.5 * x), (-1.5)**degree * f(x))


def test_kernel_is_unbiased_and_its_error_shrinks_with_the_root_of_the_width():
    u = torch.nn.functional.normalize(torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(6)), dim=1)
    exact, errors = (0.8 * u @ u.T + 1)**2, []
    for n in (64, 256, 1024):
        k = torch.stack([(lambda p: p @ p.T)(PolynomialCountSketch(n, 2, 0.8).fit(u, s)(u)) for s in range(1000)])
        errors.append((k - exact).square().mean().sqrt().item())
        assert ((k.mean(0) - exact) / (k.std(0) / 1000**0.5 + 1e-3)).abs().max() < 5
    slope = np.polyfit(np.log([64, 256, 1024]), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.08


def test_tables_depend_on_the_seed_only():
    x = torch.zeros(1, 20)
    first = PolynomialCountSketch(100).fit(x, seed=7)
    state = torch.random.get_rng_state()
    torch.rand(3); np.random.rand(3)
    PolynomialCountSketch(50, degree=3).fit(x, seed=1)
    again = PolynomialCountSketch(100).fit(x.double(), seed=7)
    assert torch.equal(first.indexHash_, again.indexHash_) and torch.equal(first.bitHash_, again.bitHash_)
    assert not torch.equal(first.indexHash_, PolynomialCountSketch(100).fit(x, seed=8).indexHash_)
    assert first.indexHash_.dtype == torch.int64 and first.indexHash_.shape == (2, 21)
    torch.random.set_rng_state(state)
    before = torch.random.get_rng_state()
    PolynomialCountSketch(50).fit(x); RandomFourierFeatures(9).fit(torch.eye(4)); DensityRatioBarrier(IdentityFeatures()).fit(*rows(0))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("kw,message", [
    (dict(n_components=0), "n_components >= 1"), (dict(degree=0), "degree >= 1"), (dict(degree=1.5), "integers"),
    (dict(gamma=0.0), "gamma > 0"), (dict(coef0=-1.0), "coef0 >= 0"), (dict(indexHash=torch.zeros(2, 4)), "both hash tables"),
])
def test_bad_sketch_parameters(kw, message):
    with pytest.raises(ValueError, match=message): PolynomialCountSketch(**kw)


def test_bad_hash_tables_and_inputs():
    x, index, bit = torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"): PolynomialCountSketch(5, indexHash=index[:, :3], bitHash=bit[:, :3]).fit(x)
    with pytest.raises(ValueError, match="0..4"): PolynomialCountSketch(5, indexHash=index + 5, bitHash=bit).fit(x)
    with pytest.raises(ValueError, match="[+]1 or -1"): PolynomialCountSketch(5, indexHash=index, bitHash=bit * 0).fit(x)
    f = PolynomialCountSketch(5)
    with pytest.raises(RuntimeError, match="call .fit"): f(x)
    with pytest.raises(ValueError, match="fitted on width 3"): f.fit(x)(torch.zeros(2, 4))


# ---- random Fourier features ----

def test_fourier_features_estimate_the_gaussian_kernel():
    x = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    f = RandomFourierFeatures(40000, sigma=1.7).fit(x)
    assert (f(x) @ f(x).T - (-torch.cdist(x, x)**2 / (2 * 1.7**2)).exp()).abs().max() < 0.03
    w, a = torch.randn(40000, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), x.clone().requires_grad_(True)
    torch.testing.assert_close(f.vjp(x, w), torch.autograd.grad((f(a) @ w).sum(), a)[0])


def test_bandwidths():
    x = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    unit = RandomFourierFeatures(50, sigma=1.0).fit(x).W_
    for sigma, expected in ("median", np.median(torch.pdist(x)) / 2**0.5), ("scale", (2.5**0.5 * x.std()).item()):
        torch.testing.assert_close(RandomFourierFeatures(50, sigma).fit(x).W_, unit / expected, rtol=2e-3, atol=1e-6)
    with pytest.raises(ValueError, match="give sigma= as a number"): RandomFourierFeatures().fit(torch.ones(9, 3))
    for bad in (-1.0, "mean", None):
        with pytest.raises(ValueError, match="sigma must be"): RandomFourierFeatures(sigma=bad)


def test_median_bandwidth_is_measured_where_the_features_are_used():
    pos, neg = rows(11)
    barrier = DensityRatioBarrier(RandomFourierFeatures(64)).fit(pos, neg)
    x = torch.nn.functional.normalize(torch.cat([pos, neg]), dim=1)
    expected = (torch.pdist(x).median() / 2**0.5).item()
    unit = RandomFourierFeatures(64, sigma=1.0).fit(x).W_
    assert (unit / barrier.features.W_).median().item() == pytest.approx(expected, rel=1e-3)


# ---- barrier ----

@pytest.mark.parametrize("n,degree,gamma,coef0,C,normalize", [
    (2000, 2, 0.1, 1.0, 1.0, True), (2001, 2, 10.0, 1.0, 1e4, True), (2000, 3, 0.5, 1.0, 100.0, True),
    (2000, 2, 1.0, 0.0, 10.0, True), (500, 1, 0.1, 1.0, 1.0, False), (8000, 2, 0.1, 1.0, 1e4, True),
])
@pytest.mark.parametrize("coordinates,fit", [("raw", "fit"), ("centred", "fit"), ("standardised", "fit"), ("standardised", "fit_calibrated")])
def test_h_and_gradient_from_the_tables_in_float64(n, degree, gamma, coef0, C, normalize, coordinates, fit):
    pos, neg = rows(12, n=160)
    barrier = getattr(DensityRatioBarrier(PolynomialCountSketch(n, degree, gamma, coef0), C, normalize, coordinates=coordinates), fit)(pos, neg)
    a = rows(13, n=200)[0]
    h = float64_h(barrier, a)
    assert (barrier.value(a).double() - h).abs().max() <= 1e-5 * max(1.0, h.abs().max().item())
    g, g64 = barrier.grad(a), Barrier.grad(barrier, a.double())
    assert (g.double() - g64).norm() <= 1e-5 * g64.norm()
    torch.testing.assert_close(barrier.grad(a.double()), g64, rtol=1e-8, atol=1e-8 * g64.abs().max().item())


@pytest.mark.parametrize("features", [IdentityFeatures, lambda: RandomFourierFeatures(100), lambda: PolynomialCountSketch(100, 3)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_gradient_is_the_derivative_of_value(features, normalize, coordinates):
    stretch = torch.linspace(.2, 3, 24, dtype=torch.float64)
    barrier = DensityRatioBarrier(features(), normalize=normalize, coordinates=coordinates).fit(*(x.double() * stretch for x in rows(14, offset=3.0)))
    a = (rows(15, offset=3.0)[0][:6].double() * stretch).view(2, 3, -1)
    torch.testing.assert_close(barrier.grad(a), Barrier.grad(barrier, a), rtol=1e-9, atol=1e-11)
    e = 1e-5 * torch.eye(a.shape[-1], dtype=torch.float64)
    finite = (barrier.value(a[..., None, :] + e) - barrier.value(a[..., None, :] - e)) / 2e-5
    torch.testing.assert_close(barrier.grad(a), finite, rtol=1e-5, atol=1e-7)


# ---- coordinates

@pytest.mark.parametrize("counts", [(100, 100), (160, 40)])
def test_coordinates_are_scikit_learns_scaler_with_classes_that_count_equally(counts):
    from sklearn.preprocessing import StandardScaler
    pos, neg = (x[:n].double() * torch.linspace(.1, 9, 24) for x, n in zip(rows(60, n=200), counts))
    X, weight = torch.cat([pos, neg]).numpy(), np.repeat([1 / len(pos), 1 / len(neg)], counts)
    scaler = StandardScaler().fit(X, sample_weight=weight)
    new = rows(61)[1].double() * torch.linspace(.1, 9, 24)
    for coordinates, moved in ("centred", lambda x: x - torch.tensor(scaler.mean_)), ("standardised", lambda x: torch.tensor(scaler.transform(x.numpy()))):
        b = DensityRatioBarrier(PolynomialCountSketch(300), C=10., coordinates=coordinates).fit(pos, neg)
        np.testing.assert_allclose(b.shift_.numpy(), scaler.mean_, rtol=1e-10)
        if coordinates == "standardised": np.testing.assert_allclose(b.scale_.numpy(), 1 / scaler.scale_, rtol=1e-10)
        by_hand = DensityRatioBarrier(PolynomialCountSketch(300), C=10.).fit(moved(pos), moved(neg))
        torch.testing.assert_close(b.value(new), by_hand.value(moved(new)), rtol=1e-6, atol=1e-7)
    raw = DensityRatioBarrier(IdentityFeatures()).fit(pos, neg)
    assert set(raw.state_dict()) == {"coef_", "intercept_", "log_prior_"}


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_repeating_a_class_moves_no_coordinates(coordinates):
    pos, neg = rows(62)
    make = lambda: DensityRatioBarrier(PolynomialCountSketch(200), coordinates=coordinates)
    once, often = make().fit(pos, neg), make().fit(pos, neg.repeat(7, 1))
    for name in {"shift_", "scale_"} & set(once.state_dict()): torch.testing.assert_close(getattr(once, name), getattr(often, name))
    moved = make().fit(pos.repeat(2, 1) + 1, neg)  # a second fit starts anew
    again = moved.fit(pos, neg)
    assert torch.equal(again.value(pos), once.value(pos))


def test_coordinates_that_never_vary_are_left_out():
    for dtype in torch.float32, torch.float64:
        pos, neg = (x.to(dtype) for x in rows(63))
        for x in pos, neg: x[:, 3], x[:, 7] = 1234.567, 0.
        b = DensityRatioBarrier(PolynomialCountSketch(300), C=10., coordinates="standardised").fit(pos, neg)
        assert (b.scale_ == 0).nonzero().flatten().tolist() == [3, 7]
        a = neg.clone()
        a[:, 3], a[:, 7] = 0., -50.
        torch.testing.assert_close(b.value(a), b.value(neg))
        assert torch.isfinite(b.grad(a)).all() and (b.grad(a)[:, [3, 7]] == 0).all()
    flat = torch.ones(10, 4)
    assert torch.isfinite(DensityRatioBarrier(PolynomialCountSketch(20), coordinates="standardised").fit(flat, flat).grad(flat)).all()


@pytest.mark.parametrize("coordinates", ["centred", "standardised"])
def test_bad_use_of_coordinates(coordinates):
    b = DensityRatioBarrier(PolynomialCountSketch(50), coordinates=coordinates)
    for use in b.value, b.grad, b.phi:
        with pytest.raises(RuntimeError, match="not fitted"): use(torch.zeros(2, 24))
    b.fit(*rows(64))
    for width in 1, 25:
        with pytest.raises(ValueError, match="fitted on width 24"): b.value(torch.zeros(2, width))
    with pytest.raises(ValueError, match="coordinates must be 'raw', 'centred' or 'standardised'; got 'whitened'"): DensityRatioBarrier(IdentityFeatures(), coordinates="whitened")
    if coordinates == "standardised":
        with pytest.raises(ValueError, match="no coordinates keep them"): b.spectral()


def test_an_outlier_coordinate_hides_the_signal_from_the_published_settings():
    "One coordinate holds most of the norm, eight vary more than the others, and none of these tells the classes apart"
    g = torch.Generator().manual_seed(65)
    def draw(n):
        x = torch.randn(2 * n, 64, generator=g)
        x[:, 0] = 60 + 6 * x[:, 0]
        x[:, 1:9] *= 4
        x[:n, 9:] += .2
        return x[:n], x[n:]
    train, test = draw(200), draw(1000)
    q = {c: barrier_quality(DensityRatioBarrier(PolynomialCountSketch(2000), coordinates=c).fit(*train), *test) for c in COORDINATES}
    assert (torch.cat(train)[:, 0].square().sum() / torch.cat(train).square().sum()) > .94
    assert q["raw"].auc + .02 < q["centred"].auc < q["standardised"].auc - .08
    assert q["raw"].log_loss > .68 > .66 > q["centred"].log_loss > q["standardised"].log_loss


def test_on_the_sphere_h_ignores_length_and_the_gradient_is_orthogonal():
    barrier = DensityRatioBarrier(PolynomialCountSketch(500, 3, 1.0)).fit(*rows(16))
    a = rows(17)[1].double()
    torch.testing.assert_close(barrier.value(7 * a), barrier.value(a), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(barrier.grad(7 * a), barrier.grad(a) / 7, rtol=1e-7, atol=1e-9)
    g = barrier.grad(a)
    assert ((g * a).sum(1).abs() <= 1e-8 * g.norm(dim=1) * a.norm(dim=1)).all()
    assert torch.isfinite(barrier.value(torch.zeros(2, 24))).all() and torch.isfinite(barrier.grad(torch.zeros(2, 24))).all()


def test_the_fit_is_the_optimum_of_ridge_logistic_regression():
    from scipy.optimize import minimize
    pos, neg = (x.double() for x in rows(18, n=150))
    barrier = DensityRatioBarrier(PolynomialCountSketch(40, gamma=1.0), C=3.0).fit(pos, neg)
    Z = barrier.phi(torch.cat([pos, neg])).numpy()
    sign = np.r_[np.ones(len(pos)), -np.ones(len(neg))]
    def loss(t):
        m = sign * (Z @ t[:-1] + t[-1])
        r = -sign / (1 + np.exp(m))
        return np.logaddexp(0, -m).sum() + t[:-1] @ t[:-1] / 6, np.append(Z.T @ r + t[:-1] / 3, r.sum())
    best = minimize(loss, np.zeros(41), jac=True, method="L-BFGS-B", options=dict(maxiter=5000, ftol=1e-15, gtol=1e-9)).x
    np.testing.assert_allclose(barrier.coef_.numpy(), best[:-1], atol=1e-5 * abs(best).max())
    assert barrier.intercept_.item() == pytest.approx(best[-1], rel=1e-4, abs=1e-4)
    assert barrier.log_prior_.item() == pytest.approx(math.log(len(neg) / len(pos)))


# ---- the fit of many activations with many features

def problem(N=700, n=90, seed=40, dtype=torch.float32):
    "Features with a large common part, as sketches have, and labels."
    g = torch.Generator().manual_seed(seed)
    Z = (torch.randn(N, n, generator=g) * torch.linspace(.01, .3, n) + 1).to(dtype)
    score = Z.float() @ torch.randn(n, generator=g) + torch.randn(N, generator=g)
    return Z, (score > score.median()).float()


def penalised_loss(Z, y, C, w, b):
    sign = np.where(y.numpy() == 1, 1., -1.)
    m = sign * (Z.double().numpy() @ w + b)
    r = -sign / (1 + np.exp(m)) / len(m)
    return np.logaddexp(0, -m).mean() + w @ w / (2 * C * len(m)), np.append(Z.double().numpy().T @ r + w / (C * len(m)), r.sum())


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("C", [.01, 1., 100.])
@pytest.mark.parametrize("shape", [(700, 90), (60, 200)])
def test_newton_ends_within_its_gap_of_the_optimum(C, shape):
    from scipy.optimize import minimize
    Z, y = problem(*shape)
    best = minimize(lambda t: penalised_loss(Z, y, C, t[:-1], t[-1]), np.zeros(shape[1] + 1), jac=True, method="L-BFGS-B", options=dict(maxiter=50000, maxfun=50000, ftol=1e-16, gtol=1e-11))
    for gap in 1e-6, 1e-9, 1e-13:
        w, b, size = logistic_newton(Z, y, C, gap)
        loss, g = penalised_loss(Z, y, C, w.numpy(), b.item())
        assert w.dtype == b.dtype == torch.float64 and loss <= best.fun + gap
        g[:-1] -= Z.double().mean(0).numpy() * g[-1]  # features are taken relative to their mean
        assert size <= math.sqrt(2 * gap / (max(C, 1) * C * len(y))) and np.linalg.norm(g) <= size * 1.01 + 2e-8
    np.testing.assert_allclose(w.numpy(), best.x[:-1], atol=1e-4 * abs(best.x).max())
    theirs = LogisticRegression(C=C).fit(Z.numpy(), y.numpy())
    assert loss <= penalised_loss(Z, y, C, theirs.coef_[0].astype(float), float(theirs.intercept_[0]))[0] * (1 + 1e-9)


def test_the_two_solvers_agree_and_blocks_do_not_matter():
    Z, y = problem(dtype=torch.float64)
    (w, b), (w2, b2, _) = logistic_regression(Z, y, 3.), logistic_newton(Z, y, 3., 1e-15)
    torch.testing.assert_close(w2, w, rtol=1e-5, atol=1e-6); torch.testing.assert_close(b2, b, rtol=1e-5, atol=1e-6)
    sizes = []
    class Table(Streamed):
        def split(self, rows):
            for z in super().split(rows):
                sizes.append(len(z))
                yield z
    w3, b3, _ = logistic_newton(Table(lambda x: x + 0, Z.float(), Z.shape[1]), y, 3.)
    w4, b4, _ = logistic_newton(Z.float(), y, 3.)
    assert max(sizes) < len(Z)
    torch.testing.assert_close(w3, w4, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12))
def test_conjugate_gradients_solve(seed, n):
    g = torch.Generator().manual_seed(seed)
    R, b = torch.randn(n, n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    M = R @ R.T + torch.eye(n)
    torch.testing.assert_close(M @ _conjugate_gradients(lambda v: M @ v, b, 1e-10), b, rtol=1e-8, atol=1e-8)
    assert (_conjugate_gradients(lambda v: M @ v, 0 * b, 1e-10) == 0).all()


@pytest.mark.parametrize("features", [lambda: PolynomialCountSketch(150, gamma=1.), lambda: PolynomialCountSketch(60, 3), lambda: RandomFourierFeatures(80), IdentityFeatures])
def test_a_large_fit_is_the_small_one_whatever_the_memory(features, monkeypatch):
    pos, neg = rows(41)
    def fitted(**kw): return DensityRatioBarrier(features(), C=10.).fit(pos, neg, **kw)
    small, a = fitted(), rows(42)[1]
    assert small.optimality_ <= 1e-9
    monkeypatch.setattr("odesteer.density._SMALL", 20)
    held, streamed = fitted(), fitted(memory=0)
    for large in held, streamed:
        torch.testing.assert_close(large.value(a), small.value(a), rtol=1e-3, atol=2e-3)
        assert large.optimality_ <= math.sqrt(2e-10 / (10 * (len(pos) + len(neg)))) and large.state_dict().keys() == small.state_dict().keys()


def test_held_out_values_of_large_fits(monkeypatch):
    pos, neg = rows(43, n=160)
    make = lambda: [DensityRatioBarrier(PolynomialCountSketch(100), C) for C in (.1, 10.)]
    small = held_out_values(make(), pos, neg)
    monkeypatch.setattr("odesteer.density._SMALL", 20)
    for (p, n), (p2, n2) in zip(small, held_out_values(make(), pos, neg)):
        torch.testing.assert_close(p2, p, rtol=1e-3, atol=2e-3); torch.testing.assert_close(n2, n, rtol=1e-3, atol=2e-3)


def test_settings_that_no_fit_can_have():
    for C in (float("inf"), float("nan"), True, "cv", 0):
        with pytest.raises(ValueError, match="C must be positive"): DensityRatioBarrier(IdentityFeatures(), C=C)
    for memory in (None, "1GB", -1, float("nan")):
        with pytest.raises(ValueError, match="memory must be a number of bytes"): DensityRatioBarrier(IdentityFeatures()).fit(*rows(1), memory=memory)


@pytest.mark.parametrize("limit", [0, 1e12])
def test_the_stated_optimality_is_that_of_the_weights(limit, monkeypatch):
    monkeypatch.setattr("odesteer.density._SMALL", limit)
    pos, neg = (x.double() for x in rows(44))
    b = DensityRatioBarrier(PolynomialCountSketch(40), C=3.).fit(pos, neg)
    Z, y = b.phi(torch.cat([pos, neg])), torch.cat([torch.ones(len(pos)), torch.zeros(len(neg))]).double()
    w, k = b.coef_.clone().requires_grad_(), b.intercept_.clone().requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(Z @ w + k, y) + w.square().sum() / (2 * 3. * len(y))
    g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, (w, k))])
    if limit: torch.testing.assert_close(torch.tensor(b.optimality_).double(), g.norm(), rtol=1e-3, atol=1e-13)
    else:  # taken relative to the mean of the features
        g[:-1] -= Z.mean(0) * g[-1]
        torch.testing.assert_close(torch.tensor(b.optimality_).double(), g.norm(), rtol=.01, atol=1e-7)  # float32 products


def test_swapping_the_classes_negates_h_and_labels_give_the_same_fit():
    pos, neg = rows(19)
    make = lambda: DensityRatioBarrier(PolynomialCountSketch(200))
    a = rows(20)[0]
    h = make().fit(pos, neg).value(a)
    torch.testing.assert_close(make().fit(neg, pos).value(a), -h, rtol=1e-4, atol=1e-5)
    order = torch.randperm(len(pos) + len(neg), generator=torch.Generator().manual_seed(1))
    X, y = torch.cat([pos, neg])[order], torch.cat([torch.ones(len(pos)), torch.zeros(len(neg))])[order]
    torch.testing.assert_close(make().fit(X, y).value(a), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_pos,n_neg", [(6000, 6000), (6000, 600), (600, 6000)])
def test_the_true_log_ratio_of_gaussians_is_found_whatever_the_counts(n_pos, n_neg):
    g = torch.Generator().manual_seed(21)
    mean, L = (torch.tensor([0.8, 0.0, 0.3]), torch.zeros(3)), (torch.diag(torch.tensor([0.7, 1.0, 1.0])), torch.eye(3) + 0.3 * torch.ones(3, 3).tril(-1))
    truth = GaussianBarrier(*mean, *(l @ l.T for l in L))
    pos, neg = (m + torch.randn(n, 3, generator=g) @ l.T for m, l, n in zip(mean, L, (n_pos, n_neg)))
    barrier = DensityRatioBarrier(PolynomialCountSketch(400, gamma=1.0), C=1e4, normalize=False).fit(pos, neg)
    test = torch.randn(500, 3, generator=g)
    miss = barrier.value(test) - truth.value(test)
    assert miss.median().abs() < 0.15 and miss.abs().mean() < 0.3


def test_value_takes_any_float_type():
    barrier = DensityRatioBarrier(PolynomialCountSketch(300)).fit(*rows(22))
    a = rows(23)[0].bfloat16()
    for x in (a, a.half(), a.float()):
        torch.testing.assert_close(barrier.value(x), barrier.value(a.float()))
        assert barrier.value(x).dtype == barrier.grad(x).dtype == torch.float32
    assert barrier.value(a.double()).dtype == barrier.grad(a.double()).dtype == torch.float64
    with torch.inference_mode(): torch.testing.assert_close(barrier.grad(a.float()), barrier.grad(a.float().clone()))


def test_probability_and_ratio():
    barrier = DensityRatioBarrier(PolynomialCountSketch(300), C=100.0).fit(*rows(24))
    a = rows(25)[1]
    h = barrier.value(a)
    torch.testing.assert_close(barrier.predict_proba(a), 1 / (1 + (-h).exp()))
    torch.testing.assert_close(barrier.density_ratio(a), h.exp())


def test_bad_barrier_input():
    pos, neg = rows(26)
    for C in (0, -1.0):
        with pytest.raises(ValueError, match="C must be positive"): DensityRatioBarrier(IdentityFeatures(), C)
    with pytest.raises(RuntimeError, match="not fitted"): DensityRatioBarrier(IdentityFeatures()).value(pos)
    fit = lambda *xs: DensityRatioBarrier(IdentityFeatures()).fit(*xs)
    with pytest.raises(ValueError, match="NaN or infinity"): fit(pos, torch.full_like(neg, math.nan))
    with pytest.raises(ValueError, match="neg is empty"): fit(pos, neg[:0])
    with pytest.raises(ValueError, match="width"): fit(pos, neg[:, 1:])
    with pytest.raises(TypeError, match="floats"): fit(pos.long(), neg)


# ---- quality and cross-validation ----

def test_quality_against_scikit_learn():
    g = torch.Generator().manual_seed(27)
    h_pos, h_neg = torch.randn(300, generator=g) + 1, torch.randn(70, generator=g) - 1
    q = quality(h_pos, h_neg)
    h, y = np.r_[h_pos.double(), h_neg.double()], np.r_[np.ones(300), np.zeros(70)]
    weight = np.where(y == 1, 1 / 300, 1 / 70)
    assert q.auc == pytest.approx(roc_auc_score(y, h))
    assert q.log_loss == pytest.approx(log_loss(y, 1 / (1 + np.exp(-h)), sample_weight=weight), rel=1e-6)
    assert len(q.stated) == len(q.observed) == 10 and q.counts.tolist() == [37] * 10 and (q.slope, q.intercept) == platt(h_pos, h_neg) and (np.diff(q.stated) > 0).all()
    assert "AUC" in repr(q)


def test_calibration_error_of_known_cases():
    g = torch.Generator().manual_seed(28)
    h_pos, h_neg = torch.randn(40000, generator=g) * 2 + 2, torch.randn(10000, generator=g) * 2 - 2  # h is its own log ratio
    assert quality(h_pos, h_neg).calibration_error < 0.01
    assert quality(3 * h_pos, 3 * h_neg).calibration_error > 0.05
    coin = quality(torch.zeros(30), torch.zeros(50))
    assert coin.auc == 0.5 and coin.calibration_error == pytest.approx(0, abs=1e-12) and coin.log_loss == pytest.approx(math.log(2))
    sure = quality(torch.full((5,), 50.0), torch.full((5,), -50.0))
    assert sure.auc == 1 and sure.calibration_error < 1e-9 and sure.log_loss < 1e-9
    assert quality(torch.full((5,), -800.0), torch.full((5,), 800.0)).log_loss == pytest.approx(800)


def test_barrier_quality_takes_both_forms():
    barrier = DensityRatioBarrier(IdentityFeatures()).fit(*rows(29))
    pos, neg = rows(30, n=1200)
    q = barrier_quality(barrier, pos, neg)
    same = barrier_quality(barrier, torch.cat([neg, pos]), torch.cat([torch.zeros(len(neg)), torch.ones(len(pos))]))
    whole = quality(barrier.value(pos), barrier.value(neg))
    assert q.auc == same.auc == whole.auc and q.log_loss == pytest.approx(same.log_loss) == pytest.approx(whole.log_loss, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(n_groups=st.integers(10, 30), per=st.integers(1, 4), seed=st.integers(0, 99))
def test_folds_partition_the_rows_and_never_split_a_group(n_groups, per, seed):
    groups = np.tile(np.repeat(np.arange(n_groups), per), 2)
    y = np.repeat([1, 0], n_groups * per)
    folds = grouped_folds(y, groups, 5, seed)
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(len(y)))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert set(y[train]) == {0, 1} and len(train) + len(test) == len(y)


def test_too_few_groups_are_named():
    with pytest.raises(ValueError, match="at least 5 groups in each class; got 3"): grouped_folds([1] * 9 + [0] * 9, [0, 1, 2] * 6)


@pytest.mark.parametrize("features", [lambda: PolynomialCountSketch(500), lambda: PolynomialCountSketch(20), lambda: RandomFourierFeatures(300), IdentityFeatures])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_held_out_values_equal_refitting(features, coordinates):
    pos, neg = (x.double() for x in rows(31, n=160))
    groups = np.r_[np.arange(160) // 4, np.arange(60) // 3]
    barriers = [DensityRatioBarrier(features(), C, coordinates=coordinates) for C in (0.1, 10.0)]
    X, y = torch.cat([pos, neg]), torch.cat([torch.ones(160), torch.zeros(60)])
    for (h_pos, h_neg), C in zip(held_out_values(barriers, pos, neg, groups, seed=3), (0.1, 10.0)):
        h = torch.cat([h_pos, h_neg])
        for train, test in grouped_folds(y, groups, seed=3):
            refit = DensityRatioBarrier(features(), C, coordinates=coordinates).fit(X[train], y[train], seed=3)
            torch.testing.assert_close(h[test], refit.value(X[test]), rtol=1e-5, atol=1e-6)


def test_choose_takes_the_least_held_out_log_loss():
    pos, neg = rows(32, n=160)
    make = lambda C=1.0, gamma=0.1: DensityRatioBarrier(PolynomialCountSketch(200, gamma=gamma), C)
    grid = dict(C=[0.01, 1.0, 100.0], gamma=[0.1, 1.0])
    best, tried = choose(make, grid, pos, neg)
    assert sorted((p["gamma"], p["C"]) for p, _ in tried) == sorted(itertools.product(grid["gamma"], grid["C"]))
    losses = {(p["gamma"], p["C"]): q.log_loss for p, q in tried}
    assert losses[best["gamma"], best["C"]] == min(losses.values())
    one = quality(*held_out_values([make(**best)], pos, neg)[0]).log_loss
    assert one == pytest.approx(min(losses.values()), rel=1e-9)
    assert choose(make, grid, pos, neg)[0] == best
    for part in ("C", "gamma"): assert set(choose(make, {part: grid[part]}, pos, neg)[0]) == {part}
    assert choose(make, {}, pos, neg)[0] == {}


def test_grouped_choice_is_not_flattered_by_rows_of_one_question():
    g = torch.Generator().manual_seed(33)
    statements = torch.randn(2, 40, 1, 60, generator=g)  # no class difference at all: only memory can help
    pos, neg = (statements + 0.1 * torch.randn(2, 40, 5, 60, generator=g)).flatten(1, 2)
    make = lambda C=1.0: DensityRatioBarrier(PolynomialCountSketch(400, gamma=10.0), C)
    ids = np.tile(np.repeat(np.arange(40), 5), 2)
    honest, leaky = (min(q.log_loss for _, q in choose(make, dict(C=[0.001, 1.0, 1000.0]), pos, neg, ids_)[1]) for ids_ in (ids, None))
    assert honest > 0.6 and leaky < 0.2


# ---- calibration

@pytest.mark.parametrize("counts", [(80, 80), (150, 40)])
@pytest.mark.parametrize("scale", [1e-3, 1., 30.])
def test_platts_line_is_scikit_learns_regression_on_smoothed_labels(counts, scale):
    g = torch.Generator().manual_seed(70)
    for gap in 0., .5, 30.:  # the last: perfectly apart
        h = [scale * (torch.randn(n, generator=g, dtype=torch.float64) + c) for n, c in zip(counts, (gap, -gap))]
        targets = (counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2)
        rows_, labels, weights = [], [], []
        for v, t in zip(h, targets):
            for label, share in (1, t), (0, 1 - t):
                rows_.append(v); labels.append(np.full(len(v), label)); weights.append(np.full(len(v), share / (2 * len(v))))
        x = torch.cat(rows_).numpy()[:, None]
        theirs = LogisticRegression(C=1e12, tol=1e-12, solver="newton-cholesky", max_iter=1000).fit(x / x.std(), np.concatenate(labels), np.concatenate(weights))
        slope, intercept = platt(*h)
        assert slope == pytest.approx(theirs.coef_[0, 0] / x.std(), rel=1e-4, abs=1e-6 / scale) and intercept == pytest.approx(theirs.intercept_[0], rel=1e-4, abs=1e-5)
        assert platt(*(slope * v + intercept for v in h)) == pytest.approx((1., 0.), abs=1e-6)  # once is enough
    assert platt(torch.zeros(3), torch.zeros(9)) == (0., 0.) and platt(torch.full((4,), -800.), torch.full((4,), 800.))[0] < 0


def test_calibration_is_scikit_learns():
    from sklearn.calibration import CalibratedClassifierCV
    pos, neg = (x[:60].double() for x in rows(71, n=160))
    X, y = torch.cat([pos, neg]), np.repeat([1, 0], 60)
    b = DensityRatioBarrier(IdentityFeatures(), C=.01, normalize=False).fit_calibrated(pos, neg, seed=2)
    inner = LogisticRegression(C=.01 * 5 / 4, tol=1e-10, solver="newton-cholesky")  # fewer rows, the same penalty per row
    theirs = CalibratedClassifierCV(inner, cv=grouped_folds(y, None, 5, 2), ensemble=False).fit(X.numpy(), y).calibrated_classifiers_[0].calibrators[0]
    assert b.calibration_["slope"] == pytest.approx(-theirs.a_, rel=1e-3) and b.calibration_["intercept"] == pytest.approx(-theirs.b_, abs=1e-3)
    plain = DensityRatioBarrier(IdentityFeatures(), C=.01, normalize=False).fit(pos, neg)
    torch.testing.assert_close(b.value(X), b.calibration_["slope"] * plain.value(X) + b.calibration_["intercept"])


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_calibrated_barrier_is_the_plain_one_times_a_number(coordinates):
    pos, neg = rows(72, n=160)
    groups = np.r_[np.arange(160) // 4, np.arange(60) // 4]
    make = lambda C=1.: DensityRatioBarrier(PolynomialCountSketch(200), C, coordinates=coordinates)
    plain, b, a = make().fit(pos, neg), make().fit_calibrated(pos, neg, groups), rows(73)[1]
    slope, intercept = (b.calibration_[k] for k in ("slope", "intercept"))
    torch.testing.assert_close(b.value(a), slope * plain.value(a) + intercept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad(a), slope * plain.grad(a), rtol=1e-4, atol=1e-6)
    h = held_out_values([make(5 / 4)], pos, neg, groups)[0]
    assert (slope, intercept) == pytest.approx(platt(*h)) and b.calibration_["log_loss"] == pytest.approx(quality(*h).log_loss)
    q = quality(*b.held_out_)
    assert q.slope == pytest.approx(1, abs=1e-6) and q.auc == quality(*h).auc and q.log_loss < quality(*h).log_loss - .05
    torch.testing.assert_close(torch.cat(b.in_sample_).float(), b.value(torch.cat([pos, neg])), rtol=1e-4, atol=1e-4)
    again = b.fit_calibrated(pos, neg, groups)
    torch.testing.assert_close(again.value(a), slope * plain.value(a) + intercept, rtol=1e-4, atol=1e-4)  # not twice
    assert b.log_prior_ == plain.log_prior_ and b.fit(pos, neg).held_out_ is None and torch.equal(b.value(a), plain.value(a))
    order = torch.randperm(220, generator=torch.Generator().manual_seed(1))
    X, y = torch.cat([pos, neg])[order], torch.cat([torch.ones(160), torch.zeros(60)])[order]
    assert make().fit_calibrated(X, y, groups[order.numpy()]).calibration_.keys() == {"slope", "intercept", "log_loss"}


def test_a_wrong_order_is_not_turned_round():
    g = torch.Generator().manual_seed(74)
    x = torch.randn(40, 1, 3, generator=g)  # both classes of a question are one point: what held-out rows say is chance or worse
    pos, neg = (x + 1e-3 * torch.randn(40, 1, 3, generator=g))[:, 0], (x + 1e-3 * torch.randn(40, 1, 3, generator=g))[:, 0]
    slopes = []
    for seed in range(6):
        b = DensityRatioBarrier(IdentityFeatures(), normalize=False).fit_calibrated(pos, neg, seed=seed)
        slopes.append(b.calibration_["slope"])
        assert b.calibration_["slope"] > 0
        plain = DensityRatioBarrier(IdentityFeatures(), normalize=False).fit(pos, neg)
        assert (torch.nn.functional.cosine_similarity(b.grad(pos), plain.grad(pos), dim=1) > 0).all()
    assert 1. in slopes
