"""Held-back checks of assignment 2, for `python -m tests.grade`.

A function is named after the answer that it is about; its parameters are names that the notebook defines."""
import time

import torch
import odesteer as ods
from odesteer.density import PolynomialCountSketch

g = torch.Generator().manual_seed(5)
def tables(degree, slots, n): return torch.randint(n, (degree, slots), generator=g), torch.randint(2, (degree, slots), generator=g)*2. - 1


def A1_is_a_matrix(count_sketch):
    H, s = torch.randint(6, (9,), generator=g), torch.randint(2, (9,), generator=g)*2. - 1
    P = count_sketch(torch.eye(9), H, s, 6).T
    z = torch.randn(2, 3, 9, generator=g)
    assert torch.allclose(count_sketch(z, H, s, 6), z @ P.T, atol=1e-6) and (P != 0).sum() == 9, "a sketch is linear, with one entry in each column"
    assert torch.equal(P[H, torch.arange(9)], s), "coordinate j goes into its bucket with its sign"

def A1_many_rows(count_sketch):
    z, H, s = torch.randn(5000, 300, generator=g), torch.randint(500, (300,), generator=g), torch.ones(300)
    start = time.perf_counter()
    assert count_sketch(z, H, s, 500).shape == (5000, 500), "5000 rows"
    assert time.perf_counter() - start < 2, "5000 rows take more than two seconds: no loop over rows"


def _library(x, H, s, n, gamma, coef0): return PolynomialCountSketch(n, len(H), gamma=gamma, coef0=coef0, indexHash=H, bitHash=s).fit(x)

def A2_other_degrees(product_sketch):
    x = torch.randn(5, 7, generator=g, dtype=torch.float64)
    for degree, n, gamma, coef0 in ((4, 33, 1., .5), (2, 1, .1, 1.), (5, 64, .7, 1.)):
        H, s = tables(degree, 8, n)
        assert torch.allclose(product_sketch(x, H, s, n, gamma, coef0).double(), _library(x, H, s, n, gamma, coef0)(x), rtol=1e-4, atol=1e-4), f"degree {degree}, n = {n}"

def A2_without_a_constant(product_sketch):
    x = torch.randn(5, 7, generator=g, dtype=torch.float64)
    H, s = tables(2, 7, 30)
    assert torch.allclose(product_sketch(x, H, s, 30, .5, 0.).double(), _library(x, H, s, 30, .5, 0.)(x), atol=1e-5), "coef0 = 0"

def A2_estimates_the_kernel(product_sketch):
    x = torch.nn.functional.normalize(torch.randn(12, 30, generator=g), dim=-1)
    H, s = tables(2, 31, 20_000)
    phi = product_sketch(x, H, s, 20_000, 1., 1.)
    assert (phi @ phi.T - (x @ x.T + 1)**2).abs().max() < .2, "inner products do not estimate (gamma x.y + c0)^D"


def A3_other_degrees(pull_back):
    x = torch.randn(3, 7, generator=g, dtype=torch.float64)
    for degree, n in ((2, 30), (4, 33)):
        H, s = tables(degree, 8, n)
        w = torch.randn(n, generator=g, dtype=torch.float64)
        assert torch.allclose(pull_back(x, w, H, s, n, .6, 1.).double(), _library(x, H, s, n, .6, 1.).vjp(x, w), rtol=1e-4, atol=1e-4), f"degree {degree}, n = {n}"

def A3_at_full_size(pull_back):
    x, w, (H, s) = torch.randn(20, 4096, generator=g)/64, torch.randn(8000, generator=g), tables(2, 4097, 8000)
    start = time.perf_counter()
    with torch.inference_mode(): mine = pull_back(x, w, H, s, 8000, .1, 1.)
    assert time.perf_counter() - start < 5, "20 rows of width 4096 take more than five seconds"
    assert torch.allclose(mine, _library(x, H, s, 8000, .1, 1.).vjp(x, w), atol=1e-3), "full size"


def _bells(n_pos, n_neg, seed):
    r = torch.Generator().manual_seed(seed)
    return torch.randn(n_pos, 2, generator=r)*.6 + torch.tensor([0., 1.]), torch.randn(n_neg, 2, generator=r) - torch.tensor([0., .8])

def B1_other_bells(log_ratio):
    truth = ods.GaussianBarrier(torch.tensor([0., 1.]), torch.tensor([0., -.8]), .36*torch.eye(2), torch.eye(2))
    at = torch.cat(_bells(200, 200, 3))
    found = [torch.as_tensor(log_ratio(*_bells(n, m, 4))(at)).float() for n, m in ((1000, 1000), (1500, 150), (150, 1500))]
    for h in found: assert (h - truth.value(at)).abs().median() < .6, "far from the truth for other bells"
    assert (found[1] - found[2]).median().abs() < .5, "h depends on the class counts"

def B1_classes_exchanged(log_ratio):
    pos, neg = _bells(500, 500, 6)
    assert torch.allclose(torch.as_tensor(log_ratio(pos, neg)(pos)).float(), -torch.as_tensor(log_ratio(neg, pos)(pos)).float(), atol=.15), "exchange the classes, and h changes its sign"


def C1_other_samples(over_climb, fitted, clouds, looks_wanted):
    for seed in (1, 2):
        s, (_, neg) = fitted(seed), clouds(300, seed + 10)
        for T, h, share in over_climb(s, neg, looks_wanted, [.5, 3.5, 9.]):
            a = s.steer(neg, T=T)
            assert abs(float(h) - s.barrier.value(a).median()) < 1e-3 and abs(float(share) - looks_wanted(a).float().mean()) < 1e-6, "other samples and strengths"

def C1_judged_by_what_is_given(over_climb, fitted, clouds):
    rows = over_climb(fitted(1), clouds(300, 11)[1], lambda a: a[:, 0] > 0, [0., 4.])
    assert abs(float(rows[1][2]) - (fitted(1).steer(clouds(300, 11)[1], T=4.)[:, 0] > 0).float().mean()) < 1e-6, "another judge of what looks wanted"


def C2_other_samples(safe_strength, fitted, clouds, looks_wanted):
    strengths = [k/2 for k in range(21)]
    for seed in (1, 2, 3):
        s, (pos, neg) = fitted(seed), clouds(300, seed + 10)
        share = {T: looks_wanted(s.steer(neg, T=T)).float().mean() for T in strengths}
        assert share[safe_strength(s, pos, neg, strengths)] > .8*max(share.values()), "other samples: too far, or not far enough"
