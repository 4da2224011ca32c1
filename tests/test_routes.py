"All routes of one field are the same field: beside float64 by plain convolution, through every unit of strength, compiled and copied."
import copy
import functools
import pickle

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.barrier import Barrier, ascent
from odesteer import density
from odesteer.density import DensityRatioBarrier, PolynomialCountSketch, RandomFourierFeatures, _diagonal, product_costs, route
from odesteer.ode import KrylovBarrier, ODESteer, integrate

from .project import rewrite
from .test_density import reference_sketch
from .test_ode import NoHostSync

D = 20
ROUTES = "spectral", "krylov", "dense", "fft"
def routes(coordinates="raw", **kw): return ROUTES[2:] if coordinates == "standardised" else ROUTES


def draw(n, shift, seed):
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * torch.linspace(.4, 1.6, D) + 1
    x[:, :3] += shift * (1 + .5 * x[:, 3:6]**2)
    return x


POS, NEG, NEW = draw(90, .5, 0), draw(70, -.5, 1), draw(30, -.5, 2)
FORMS = [dict(), dict(coordinates="centred"), dict(coordinates="centred", n_components=6), dict(coordinates="standardised"), dict(coordinates="centred", calibrate=True), dict(n_components=6), dict(coef0=0.), dict(normalize=False, gamma=.1), dict(gamma=.1, C=1., n_components=1000)]  # six buckets: a matrix of low rank


def fresh(**kw): return ODESteer(**{**dict(n_components=128, gamma=1., C=100.), **kw}).fit(POS, NEG)

fitted = functools.cache(fresh)  # for tests that change nothing


def closest(x, y): return ((x.double() - y.double()).norm(dim=-1) / y.double().norm(dim=-1)).max().item()


def by_definition(s, x):
    "h in float64 from the tables: bucket loops and circular convolution"
    b, f = s.barrier, s.barrier.features
    u = x.double().numpy()
    if b.coordinates != "raw": u = u - b.shift_.double().numpy()
    if b.coordinates == "standardised": u = u * b.scale_.double().numpy()
    if b.normalize: u = u / np.linalg.norm(u, axis=1, keepdims=True)
    psi = np.stack([reference_sketch(r, f.indexHash_, f.bitHash_, f.gamma, f.coef0, f.n_components) for r in u])
    return torch.tensor(psi) @ b.coef_.double() + b.intercept_.double() + b.log_prior_.double()


# ---- one barrier, three ways

@pytest.mark.parametrize("kw", FORMS, ids=str)
def test_values_and_gradients_by_every_route(kw):
    s = fresh(**kw)
    h, gold = by_definition(s, NEW), Barrier.grad(copy.deepcopy(s.barrier), NEW.double())
    size = max(1., h.abs().max().item())
    for dtype, tol in (torch.float32, 1e-5), (torch.float64, 1e-11):
        x, b = NEW.to(dtype), s._on(NEW.to(dtype)).barrier
        for method in "dense", "fft":
            b.method = method
            assert (b.value(x).double() - h).abs().max() <= tol * size
            assert (b.grad(x).double() - gold).norm() <= tol * gold.norm()
            value, slope = b.value_and_grad(x)
            assert (value.double() - h).abs().max() <= tol * size and (slope.double() - gold).norm() <= tol * gold.norm()
        if b.coordinates == "standardised": continue
        way = b.spectral()
        y = way.enter(x)
        assert (way.value(y).double() - h).abs().max() <= tol * size
        torch.testing.assert_close(y.norm(dim=-1), (x if b.coordinates == "raw" else x - b.shift_).norm(dim=-1))
        if not way.low_rank: torch.testing.assert_close(way.leave(x, y, y), x, rtol=0, atol=0)
        after = way.leave(x, y, y + 1e-2 * way.direction(y))
        assert closest(after, NEW.double() + 1e-2 * ascent(gold)) <= tol
        value, slope = way.value_and_grad(y)
        assert (value.double() - h).abs().max() <= tol * size and torch.equal(slope, way.grad(y))
        torch.testing.assert_close(slope.norm(dim=-1).double(), gold.norm(dim=-1), rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)


@pytest.mark.parametrize("degree,n,coef0", [(D, n, c) for D in (1, 2, 3, 4) for n in (16, 17) for c in (1., 0.)])
def test_score_is_the_inner_product_with_the_sketch(degree, n, coef0):
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, 3, 9, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    f = PolynomialCountSketch(n, degree, .7, coef0).fit(x)
    expected = torch.tensor([[reference_sketch(r, f.indexHash_, f.bitHash_, .7, coef0, n) @ w.numpy() for r in rows] for rows in x.numpy()])
    torch.testing.assert_close(f.score(x, w), expected, rtol=1e-10, atol=1e-10)
    W, read = f.spectrum(w)
    assert torch.equal(f.score(x, w, read), f.score(x, w)) and torch.equal(f.vjp(x, w, W), f.vjp(x, w)) and f.score(x[:0], w).shape == (0, 3)


@pytest.mark.parametrize("n,coef0", [(n, c) for n in (16, 17, 33) for c in (1., 0., .3)])
def test_two_tables_are_one_complex_signal(n, coef0):
    "The gradient by a transform there and one back, for whatever shape, also of more rows than are taken at once, and differentiable"
    g = torch.Generator().manual_seed(5)
    x, w = torch.randn(2, 35, 9, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    f = PolynomialCountSketch(n, 2, .7, coef0).fit(x)
    a, pairs = x.clone().requires_grad_(), f.pairs(w)
    expected, = torch.autograd.grad((f(a) @ w).sum(), a)
    torch.testing.assert_close(f.pair_product(x, pairs) + pairs[-2], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((f.pair_product(x.float(), f.pairs(w.float())) + pairs[-2].float()).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(f.pair_product(x[0, 0], pairs) + pairs[-2], expected[0, 0], rtol=1e-10, atol=1e-10)
    assert f.pair_product(x[:0], pairs).shape == (0, 35, 9)
    Q = f.quadratic_form(w)[0]
    bent, = torch.autograd.grad(f.pair_product(a, pairs)[1, 3, 2], a)
    torch.testing.assert_close(bent[1, 3], Q[2], rtol=1e-10, atol=1e-10)
    assert bent.count_nonzero() <= 9


@pytest.mark.parametrize("coef0", [1., 0., .3])
def test_quadratic_form_is_the_score(coef0):
    g = torch.Generator().manual_seed(4)
    x, w = torch.randn(5, 9, generator=g, dtype=torch.float64), torch.randn(33, generator=g, dtype=torch.float64)
    f = PolynomialCountSketch(33, 2, .7, coef0).fit(x)
    Q, c, k = f.quadratic_form(w)
    assert torch.equal(Q, Q.T)
    torch.testing.assert_close((x @ Q * x).sum(1) / 2 + x @ c + k, torch.tensor([reference_sketch(r, f.indexHash_, f.bitHash_, .7, coef0, 33) @ w.numpy() for r in x.numpy()]))
    with pytest.raises(ValueError, match="degree 2"): PolynomialCountSketch(33, 3).fit(x).quadratic_form(w)


# ---- the flow

STRENGTHS = dict(T=2.), dict(T=-1.), dict(share=.2), dict(until=1.), dict(nats=2.), dict(nats=-1.5), dict(until=.5, T=.4)


@pytest.mark.filterwarnings("ignore:.*could not reach", "ignore:nats= and until=")
@pytest.mark.parametrize("kw", FORMS + [dict(solver="midpoint"), dict(solver="rk4", retract=True), dict(steps=1), dict(steps=40)], ids=str)
def test_every_strength_by_every_route_beside_float64(kw):
    gold = fitted(**kw, method="fft")
    for strength in STRENGTHS:
        end = gold.steer(NEW.double(), **strength)
        for method in routes(**kw):
            s = fitted(**kw, method=method)
            assert s.route(NEW) == method
            assert closest(s.steer(NEW, **strength), end) < 1e-5, (method, strength)
            assert closest(s.steer(NEW.double(), **strength), end) < (1e-9 if "T" in strength and len(strength) == 1 else 1e-6), (method, strength)
    assert closest(fitted(**kw).steer(NEW, 2.), gold.steer(NEW.double(), 2.)) < 1e-5


@pytest.mark.parametrize("kw", [dict(degree=3), dict(metric="covariance"), dict(normalize=False, retract=True), dict(coordinates="standardised"), dict(coordinates="centred", retract=True)], ids=str)
def test_where_coordinates_cannot_turn_the_other_routes_are_taken(kw):
    s = fitted(**kw)
    assert s.route(NEW) != "spectral"
    with pytest.raises(ValueError, match="method='spectral' needs"): fitted(**kw, method="spectral")
    with pytest.raises(ValueError, match="rank= needs"): fitted(**kw, rank=3)
    assert closest(s.steer(NEW, 2.), fitted(**kw, method="fft").steer(NEW.double(), 2.)) < 1e-5


def test_trajectory_and_steer_take_one_route():
    for method in ROUTES:
        s = fitted(method=method)
        path = s.trajectory(NEW, 2.)
        assert torch.equal(path[0], NEW) and torch.equal(path[-1], s.steer(NEW, 2.))


@pytest.mark.parametrize("coordinates,offset", [("raw", 0.), ("centred", 0.), ("centred", 300.)])
def test_no_row_ends_below_its_level(coordinates, offset):
    s = ODESteer(n_components=128, gamma=1., C=100., method="spectral", coordinates=coordinates).fit(POS + offset, NEG + offset)
    for dtype in torch.float32, torch.float64:
        x = (torch.cat([NEW, POS]) + offset).to(dtype)
        for level in -1., 0., 1.7:
            stop, h = s.stop_at(x, until=level), s.barrier.value(x) if dtype == torch.float32 else s._on(x).barrier.value(x)
            good = h >= level
            assert stop.reached.all() and (stop.h >= level).all() and (s._on(x).barrier.value(stop.a) > level - 1e-5).all()
            assert torch.equal(stop.a[good], x[good]) and torch.equal(stop.h[good], h[good])


@pytest.mark.parametrize("method", ROUTES)
def test_rows_of_zeros_and_odd_rows_do_not_spoil_others(method):
    s = fitted(method=method)
    x = NEW[:5].clone()
    x[1], x[2], x[3] = 0, torch.nan, 1e-20
    out = s.steer(x, 1.)
    torch.testing.assert_close(out[[0, 4]], s.steer(NEW[[0, 4]], 1.), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(out[[1, 3]]).all() and out[2].isnan().any() and torch.equal(s.steer(x, 0.)[[0, 1, 3, 4]], x[[0, 1, 3, 4]])


def test_gradients_pass_through_every_route():
    x = NEW[:3].double()
    def jacobian(s): return torch.autograd.functional.jacobian(lambda a: s.steer(a, 1.5).sum(0), x)
    for method in "spectral", "krylov", "dense": torch.testing.assert_close(jacobian(fitted(method=method)), jacobian(fitted(method="fft")), rtol=1e-6, atol=1e-8)
    low = NEW[:3].double().requires_grad_()
    fitted(n_components=6).steer(low, 1.5).sum().backward()
    assert torch.isfinite(low.grad).all() and (low.grad != 0).any()


# ---- low rank: exact where eigenvalues are equal, measured where they are not

@pytest.mark.parametrize("equal", [0., -1.3])
def test_equal_eigenvalues_are_left_out_exactly(equal):
    g = torch.Generator().manual_seed(5)
    V0 = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64)).Q
    l = torch.cat([torch.randn(5, generator=g, dtype=torch.float64), torch.full((25,), equal, dtype=torch.float64)])
    Q = (V0 * l) @ V0.T
    for c in torch.randn(30, generator=g, dtype=torch.float64), V0[:, 2], V0[:, 20], torch.zeros(30, dtype=torch.float64):  # outside, inside, in the rest, none
        kept, V, cV, rest, error = _diagonal((Q + Q.T) / 2, c)
        assert V.shape == (30, 6) and error < 1e-12
        torch.testing.assert_close((V * kept) @ V.T + rest * (torch.eye(30) - V @ V.T), Q, rtol=0, atol=1e-9)
        torch.testing.assert_close(V @ cV, c, rtol=0, atol=1e-9)
    assert _diagonal(torch.diag(torch.arange(30.).double()), c)[3] is None


def test_a_narrow_sketch_works_in_few_coordinates():
    g = torch.Generator().manual_seed(6)
    pos, neg = torch.randn(2, 50, 120, generator=g) + torch.tensor([[[.3]], [[-.3]]])
    s = ODESteer(n_components=10).fit(pos, neg)
    assert s.barrier.spectral().V.shape[1] <= 21 and s.barrier.spectral().error < 1e-12
    slow = ODESteer(n_components=10, method="fft").fit(pos, neg)
    for strength in dict(T=20.), dict(until=.3), dict(nats=-.2): assert closest(s.steer(neg, **strength), slow.steer(neg.double(), **strength)) < 1e-5


@pytest.mark.parametrize("rank", [0, 1, 5, 12, D - 3, D, 50])
@pytest.mark.parametrize("coordinates", ["raw", "centred"])
def test_rank_is_off_by_no_more_than_it_says(rank, coordinates):
    s, exact = fitted(rank=rank, coordinates=coordinates), fitted(coordinates=coordinates)
    way, b = s._on(NEW.double()).barrier.spectral(rank), exact._on(NEW.double()).barrier
    m = b.shift_ if coordinates == "centred" else 0
    x = m + torch.nn.functional.normalize(torch.cat([NEW, POS, NEG]).double() - m, dim=-1)
    y = way.enter(x)
    tangent = (way.leave(x, y, y + way.grad(y)) - x)
    assert (tangent - b.grad(x)).norm(dim=-1).max() <= way.error + 1e-9  # on the unit sphere
    off = ((s._on(x).steer(torch.cat([POS, NEG]).double(), 1e-4) - torch.cat([POS, NEG]).double()) / 1e-4 - b_field(exact)).norm(dim=-1).max()
    assert off == pytest.approx(s.rank_error_.item(), abs=2e-3)
    if rank >= D: assert s.rank_error_ < 1e-5 and closest(s.steer(NEW, 2.), exact.steer(NEW, 2.)) < 1e-5


def b_field(s): return s.vector_field(torch.cat([POS, NEG]).double())


def test_error_of_rank_falls_is_shown_and_saved(tmp_path):
    off = [fitted(rank=r).rank_error_.item() for r in (0, 4, 8, 12, 16)]
    assert off == sorted(off, reverse=True) and off[-1] > 0
    s = fitted(rank=4)
    assert "rank=4" in repr(s) and f"{s.rank_error_.item():.2g}" in repr(s) and "rank" not in repr(fitted())
    s.save_pretrained(tmp_path)
    again = ods.load_steerer(tmp_path)
    assert torch.equal(again.rank_error_, s.rank_error_) and torch.equal(again.steer(NEW, 2.), s.steer(NEW, 2.)) and repr(again) == repr(s)
    assert not hasattr(fitted(), "rank_error_")


# ---- the rule

def test_the_rule():
    "By what a product costs, with the matrix and by transforms: here as a quiet machine may say"
    def by(dense, fft, width=2048, evaluations=10, **kw): return route(2, width, 8000, evaluations, costs=(dense, fft), **kw)
    assert by(1, 1, 1024) == "spectral" and by(1, .3, 1024) == "krylov" and by(1, 1) == by(5, 1) == "krylov"  # wide: no decomposition
    assert [by(*costs, evaluations=1) for costs in ((1, 2), (2, 1))] == [by(*costs, diagonal=False) for costs in ((1, 2), (2, 1))] == ["dense", "fft"]
    assert by(1, 2, evaluations=4) == "dense" and by(2, 1, evaluations=4) == "fft" and by(1, 2, 64, 3) == "spectral"
    assert [route(2, d, 8000, 10) for d in (64, 576, 8192)] == ["spectral", "spectral", "krylov"] and [route(2, d, 8000) for d in (64, 8192)] == ["dense", "fft"]
    assert {route(D, d, 8000, e, dev) for D in (1, 3) for d in (64, 4096) for e in (1, 10) for dev in ("cpu", "cuda")} == {"fft"}
    assert [route(2, d, 8000, 10, "cuda") for d in (64, 4096, 16384)] == ["spectral", "spectral", "fft"] and route(2, 4096, 8000, 1, "cuda") == "dense"


def test_a_cost_is_counted_where_that_tells_and_measured_once_where_not(monkeypatch):
    asked = []
    def seconds(width, n_components, rows, threads):
        asked.append((width, n_components, rows, threads))
        return ratio, 1.
    monkeypatch.setattr(density, "_seconds", seconds)
    for ratio in 1 / 3, 3., 1.1:
        dense, fft = product_costs(1024, 8000)
        assert (dense / fft == ratio) == (ratio != 1.1) and (dense < fft or ratio == 3)  # a near tie is counted
    assert asked == 3 * [(1024, 8000, 1, torch.get_num_threads())] and product_costs(400, 8000)[0] == 400**2 and len(asked) == 3
    for rows in (7, 8, 31, 32, 500): product_costs(1500, 8000, rows)
    assert [a[2] for a in asked[3:]] == [1, 8, 8, 32, 32]
    before = torch.get_rng_state()
    monkeypatch.undo()
    assert density._seconds(96, 50, 2, 0) is density._seconds(96, 50, 2, 0) and min(density._seconds(96, 50, 2, 0)) > 0
    assert torch.equal(torch.get_rng_state(), before)


# ---- a path in a few coordinates

def wide(d=300, **kw):
    g = torch.Generator().manual_seed(9)
    pos, neg, new = torch.randn(3, 40, d, generator=g) + torch.tensor([.3, -.3, -.3])[:, None, None]
    return ODESteer(**{**dict(n_components=400), **kw}).fit(pos, neg), new


@pytest.mark.parametrize("kw", [dict(), dict(coef0=0.), dict(gamma=3., C=100.), dict(coordinates="centred"), dict(normalize=False, gamma=.01), dict(retract=True, solver="rk4")], ids=str)
def test_a_krylov_path_beside_float64_and_its_foreseen_error(kw):
    (s, new), (slow, _) = wide(method="krylov", **kw), wide(method="fft", **kw)
    T = .3 * s.median_norm_
    exact = slow.steer(new.double(), T.double())
    for x, tol in (new, 1e-5), (new.double(), 1e-11): assert ((s.steer(x, T.to(x)) - exact).norm(dim=-1) / T).max() < tol
    rows = slow._on(new.double())
    way = KrylovBarrier(rows.barrier, new.double())
    for _ in range(3):
        y0 = way.enter(new.double())
        torch.testing.assert_close(way.leave(new.double(), y0, y0), new.double(), rtol=0, atol=0)
        torch.testing.assert_close(way.value(y0), rows.barrier.value(new.double()), rtol=1e-9, atol=1e-9)
        y = integrate(way.direction, y0, T.double(), 10, s._step(y0))
        off = ((way.leave(new.double(), y0, y) - exact).norm(dim=-1) / T).max()
        assert off < 3 * way.error(y) + 1e-11
        way.a_chain.grow()
    one, shaped = s.steer(new[0], T), s.steer(new.view(4, 10, -1), T)
    torch.testing.assert_close(one, s.steer(new, T)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shaped.view_as(new), s.steer(new, T), rtol=1e-5, atol=1e-5)


def test_a_path_that_needs_more_is_followed_by_the_field(monkeypatch):
    s, new = wide(method="krylov", gamma=30., C=1e4)
    T, took = 3 * s.median_norm_, []
    follow = KrylovBarrier.follow
    monkeypatch.setattr(KrylovBarrier, "follow", lambda self, *args: took.append((self, follow(self, *args))) or took[-1][1])
    end = s.steer(new, T)
    assert took[0][1] is None and len(took[0][0].a_chain.alphas) == 10 and torch.equal(end, wide(method="dense", gamma=30., C=1e4)[0].steer(new, T))
    for rows in s.barrier._vjp(torch.zeros(1, 300), s.barrier.coef_), torch.full((1, 300), torch.nan), torch.zeros(1, 300):  # in the chain of c, no number, nowhere
        assert torch.equal(s.steer(rows, T).isnan(), wide(method="fft", gamma=30., C=1e4)[0].steer(rows, T).isnan())


def test_the_widest_need_no_preparation():
    s, new = wide(1100, n_components=2000)
    assert s.route(new) == "krylov"
    end = s.steer(new, share=.2)
    assert not any(name == ("spectral", None) for name, *_ in s.barrier._derived_tables) and closest(end, wide(1100, n_components=2000, method="fft")[0].steer(new.double(), share=.2)) < 1e-5
    many, strengths = new.repeat(5, 1).view(2, 100, -1), torch.linspace(.1, .3, 200).view(2, 100)  # more than are followed together
    for unit in "T", "nats": torch.testing.assert_close(s.steer(many, **{unit: strengths}).view(200, -1)[3::40], s.steer(new[3].expand(5, -1), **{unit: strengths.flatten()[3::40]}), rtol=1e-5, atol=1e-5)
    path, stop = s.trajectory(many, 2.), s.stop_at(many, nats=.1)
    assert path.shape == (11, 2, 100, 1100) and torch.equal(path[0], many) and torch.equal(path[-1], s.steer(many, 2.))
    assert stop.a.shape == many.shape and stop.T.shape == stop.h.shape == stop.reached.shape == (2, 100) and s.steer(new[:0], share=.2).shape == (0, 1100)


def test_which_route_is_said():
    assert fitted().route(NEW) == "spectral" and fitted(steps=1).route(NEW) == "dense" and fitted(degree=3).route(NEW) == "fft" and fitted(metric="covariance").route(NEW) == "dense"
    assert fitted(features="rff").route(NEW) is None and ods.StepODESteer(n_components=64).fit(POS, NEG).route(NEW) == "dense"
    own = DensityRatioBarrier(PolynomialCountSketch(64), method="fft")
    assert ODESteer(barrier=own).fit(POS, NEG).route(NEW) == "fft" and ODESteer(barrier=own, method="spectral").fit(POS, NEG).route(NEW) == "spectral"


@pytest.mark.parametrize("kw,message", [(dict(method="fast"), "method must be one of auto, spectral, krylov, dense, fft; got 'fast'"), (dict(method="dense", degree=3), "method='dense' needs features='count-sketch' with degree=2"),
                                     (dict(method="fft", features="rff"), "method='fft' needs features='count-sketch'"), (dict(rank=-1), "rank must be a whole number"), (dict(rank=2.5), "rank must be"), (dict(rank=3, method="fft"), "rank= is for the spectral route")])
def test_routes_that_do_not_exist(kw, message):
    with pytest.raises(ValueError, match=message): ODESteer(**kw)


def test_a_given_barrier_must_have_the_route():
    for h in ods.LinearBarrier(torch.ones(D)), DensityRatioBarrier(RandomFourierFeatures(20)):
        for kw in dict(method="spectral"), dict(rank=2):
            with pytest.raises(ValueError, match="needs features='count-sketch'"): ODESteer(barrier=h, **kw).fit(POS, NEG)
    with pytest.raises(ValueError, match="method must be 'auto', 'dense' or 'fft'"): DensityRatioBarrier(PolynomialCountSketch(8), method="spectral")


# ---- what is kept must never be stale, saved or copied

@pytest.mark.parametrize("kw", [dict(), dict(coordinates="centred"), dict(coordinates="standardised", calibrate=True)], ids=str)
def test_what_was_made_from_old_weights_is_made_anew(kw):
    for method in routes(**kw):
        s = fresh(method=method, **kw)
        before = s.steer(NEW, 1.)
        s.fit(NEG, POS)
        assert torch.equal(s.steer(NEW, 1.), fresh(method=method, **kw).fit(NEG, POS).steer(NEW, 1.)) and not torch.allclose(s.steer(NEW, 1.), before)
        there = s.steer(NEW, -1.)
        s.barrier.coef_.mul_(-1)  # weights changed in place
        torch.testing.assert_close(s.steer(NEW, 1.), there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coordinates", ["raw", "centred", "standardised"])
def test_copies_and_files_leave_it_out(coordinates):
    s = fresh(coordinates=coordinates)
    keys = set(s.state_dict())
    s.steer(NEW, 1.), s.steer(NEW.double(), 1.), s.barrier.value(NEW)
    assert s.barrier._derived_tables and set(s.state_dict()) == keys
    for twin in copy.deepcopy(s), pickle.loads(pickle.dumps(s)):
        assert not twin.barrier._derived_tables and not twin.barrier.features._derived_tables and torch.equal(twin.steer(NEW, 1.), s.steer(NEW, 1.))


def test_a_card_without_the_new_names_still_loads(tmp_path):
    s = fresh()
    s.save_pretrained(tmp_path)
    new = {"method", "rank", "coordinates", "calibrate"}
    rewrite(tmp_path, lambda c: {**c, "chosen": {}, "params": {k: v for k, v in c["params"].items() if k not in new}}, sealed=False)
    assert torch.equal(ods.load_steerer(tmp_path).steer(NEW, 1.), s.steer(NEW, 1.))


def test_what_is_made_in_inference_mode_serves_later():
    s = fresh()
    with torch.inference_mode(): inside = s.steer(NEW.clone(), 1.)
    x = NEW.clone().requires_grad_()
    s.steer(x, 1.).sum().backward()
    assert torch.equal(inside, s.steer(NEW, 1.)) and (x.grad != 0).any()


# ---- compiled and captured: no wait for the device, no break in the graph

@pytest.mark.parametrize("kw", [dict(), dict(degree=3), dict(metric="covariance"), dict(n_components=6, solver="midpoint", retract=True), dict(coordinates="centred", n_components=6), dict(coordinates="standardised", calibrate=True)], ids=str)
def test_one_graph_and_no_wait(kw):
    s, t, rows = fitted(**kw, steps=2), torch.tensor(.7), torch.linspace(-1, 1, len(NEW))
    s.steer(NEW, 1.), s.stop_at(NEW, nats=1.)  # makes what the route needs
    for unit, value in ("T", rows), ("until", t), ("nats", rows):
        def f(a, v): return s.steer(a, **{unit: v})
        torch._dynamo.reset()
        with torch.no_grad():
            expected, compiled = f(NEW, value), torch.compile(f, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(NEW, value), expected)
            torch.testing.assert_close(compiled(NEW + .1, value), f(NEW + .1, value))
            with NoHostSync(): (s.steer if unit in ("T", "share") else s.stop_at)(NEW, **{unit: value})


@pytest.mark.parametrize("method", ["spectral", "krylov", "dense", "fft"])
def test_autocast_does_not_lower_the_precision(method):
    s = fitted(method=method)
    def results(s): return s.steer(NEW, 1.), s.trajectory(NEW, 1.), s.stop_at(NEW, nats=1.).a, s.vector_field(NEW)
    expected = results(s)
    with torch.autocast("cpu", torch.bfloat16): cast, again = results(s), results(fitted(method=method))
    for a, b, c in zip(expected, cast, again): assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("kw", [dict(method=m) for m in ROUTES] + [dict(coordinates="centred"), dict(coordinates="centred", n_components=6), dict(coordinates="standardised")], ids=str)
def test_forward_derivatives_and_vmap(kw):
    s = fitted(**kw)
    x, v = NEW[:3].double(), torch.randn(3, NEW.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    f = lambda a: s.steer(a, 1.)
    slope = torch.func.jvp(f, (x,), (v,))[1]
    torch.testing.assert_close(slope, (f(x + 1e-6 * v) - f(x - 1e-6 * v)) / 2e-6, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.vmap(f)(x), f(x))


@pytest.mark.parametrize("method", ["spectral", "krylov", "dense", "fft"])
def test_a_number_that_changes_does_not_break_the_graph(method):
    s = fitted(method=method)
    s.steer(NEW, 1.)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, T: s.steer(a, T), backend="eager", fullgraph=True)
    with torch.no_grad():
        for T in (1., 2., -3.): torch.testing.assert_close(compiled(NEW, T), s.steer(NEW, T))


@pytest.mark.parametrize("method", ["spectral", "krylov", "dense", "fft"])
def test_a_row_without_slope_stays_finite(method):
    s, zero = fitted(method=method, coef0=0.), torch.zeros(2, NEW.shape[1])
    for T in (0., 1., torch.tensor([0., 1.])): assert s.trajectory(zero, T).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*could not reach", "ignore:nats= and until=")
@pytest.mark.parametrize("steps, unit", [(1, dict(nats=.5)), (2, dict(T=1.))], ids=str)
def test_a_model_compiles_whatever_the_unit_and_the_batch(steps, unit):
    "Levels, and batches of another size, may ask for a route that was not prepared when the steerer was attached"
    from .archs import VOCAB, WIDTH, tiny_model
    model, g = tiny_model("llama", num_hidden_layers=2), torch.Generator().manual_seed(0)
    s = ods.ODESteer(n_components=2, steps=steps).fit(torch.randn(40, WIDTH, generator=g) + .5, torch.randn(40, WIDTH, generator=g))
    for rows in (1, 70):
        ids = torch.randint(4, VOCAB, (rows, 5), generator=g)
        with torch.no_grad(), ods.steering(model, s, layer=1, **unit) as h:
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(compiled, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        assert h.applied == 2 * rows


def test_what_is_not_prepared_is_not_made_inside_a_graph():
    s = fitted(steps=3)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda a: s.steer(a, 1.), backend="eager", fullgraph=True)(NEW)
        assert not s.barrier._derived_tables
        torch.testing.assert_close(compiled, s.steer(NEW, 1.), rtol=1e-5, atol=1e-5)
