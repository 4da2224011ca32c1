"The tracking-error bound on dynamics whose curvature is known, its norms against brute force, and the similarity of Jacobians"
import numpy as np
import pytest
import scipy.linalg
import torch

from odesteer.linear import curvature, error_bound, foreseen_bound, induced_norm, lyapunov_metric, metric_norm, riccati, similarity

D, L = 5, 7

def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def positive(seed): M = normal(D, D, seed=seed); return M @ M.T + .1*torch.eye(D).double()

class Quadratic:
    "x -> A x + (b/2) x^2, coordinate by coordinate: its Jacobian A + b diag(x) has the Lipschitz constant b in plain lengths, and no smaller one"
    def __init__(self, scale=1., bend=.3, seed=0): self.A, self.b = scale * (torch.eye(D).double() + .4*normal(L, D, D, seed=seed)), bend * (1 + torch.arange(L)/L).double()
    def step(self, t, x): return x @ self.A[t].T + self.b[t]/2 * x**2
    def known(self, P):
        "The same constants in the rulers of the bound: |r|_after <= c/2 |delta|_before^2"
        lam = torch.linalg.eigvalsh(P)
        return self.b * lam[1:, -1].sqrt() / lam[:-1, 0]
    def run(self, K, delta):
        "Deviations from a path through 0 (nominal x = 0), corrected by -K delta"
        out = [delta]
        for t in range(L): out.append(self.step(t, out[-1]) - out[-1] @ K[t].T)
        return torch.stack(out)

def loops(world, closed):
    K = torch.stack(riccati(world.A, q=1., r=1., qf=1.)) if closed else torch.zeros_like(world.A)
    return K, world.A - K

def sizes(deltas, P): return torch.stack([metric_norm(d, p) for d, p in zip(deltas, P)])


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_with_the_known_constant(closed, seed):
    world = Quadratic(seed=seed)
    K, A_hat = loops(world, closed)
    P = lyapunov_metric(A_hat)
    c, deltas = world.known(P), world.run(K, .2 * torch.nn.functional.normalize(normal(200, D, seed=10 + seed), dim=1))
    size = sizes(deltas, P)
    assert (size <= error_bound(A_hat, P, c, deltas) * (1 + 1e-9)).all()
    foreseen = foreseen_bound(P, c, size[0].max())
    assert (size.max(1).values <= foreseen * (1 + 1e-9)).all()  # a priori: nothing of the run but the size of the knock
    assert (curvature(A_hat, P, deltas) <= c * (1 + 1e-9)).all() and (curvature(A_hat, P, deltas) > .01*c).all()
    assert (size > error_bound(A_hat, P, 0*c, deltas) * (1 + 1e-9)).any() or closed  # the remainders are needed: without them the bound breaks


def test_bound_without_remainders_breaks_where_the_worst_direction_is_hit():
    "One coordinate, growing: with c = 0 the bound is the linear error, which the bend exceeds"
    A, P = torch.full((3, 1, 1), 1.2).double(), lyapunov_metric(torch.full((3, 1, 1), 1.2).double())
    x = [torch.full((1, 1), .5).double()]
    for _ in range(3): x.append(1.2*x[-1] + .2*x[-1]**2)
    deltas = torch.stack(x)
    c = curvature(A, P, deltas)
    torch.testing.assert_close(error_bound(A, P, c, deltas)[:, 0], sizes(deltas, P)[:, 0])  # one dimension, all of one sign: the bound is the error
    assert (error_bound(A, P, 0*c, deltas)[1:, 0] < sizes(deltas, P)[1:, 0]).all()
    torch.testing.assert_close(c, .4 * P[1:, 0, 0].sqrt() / P[:-1, 0, 0])


def test_foreseen_bound_is_its_recursion_and_shrinks_below_its_threshold():
    world = Quadratic(scale=.4)
    _, A_hat = loops(world, False)
    P = lyapunov_metric(A_hat)
    c = world.known(P)
    gamma = torch.stack([induced_norm(A, before, after) for A, before, after in zip(A_hat, P, P[1:])])
    small = .9 * (2*(1 - gamma)/c).min().item()
    rho = foreseen_bound(P, c, small)
    assert (rho.diff() < 0).all()
    for k in range(L): torch.testing.assert_close(rho[k + 1], gamma[k]*rho[k] + c[k]/2*rho[k]**2)
    assert (foreseen_bound(P, c, 3*(2*(1 - gamma)/c).max().item()).diff() > 0).all()


def test_lyapunov_metric_adds_up_what_is_to_come():
    A_hat, z = .6*normal(L, D, D), normal(D, seed=1)
    P, steps = lyapunov_metric(list(A_hat)), [z]
    for A in A_hat: steps.append(A @ steps[-1])
    for t in range(L + 1):
        ahead, total = normal(D, seed=2), 0.
        for A in A_hat[t:]: total, ahead = total + ahead @ ahead, A @ ahead
        torch.testing.assert_close(metric_norm(normal(D, seed=2), P[t])**2, total + ahead @ ahead)
    A = .5 * A_hat[0] / torch.linalg.eigvals(A_hat[0]).abs().max()
    settled = scipy.linalg.solve_discrete_lyapunov(A.T.numpy(), np.eye(D))
    torch.testing.assert_close(lyapunov_metric(A.expand(200, D, D))[0], torch.from_numpy(settled))


@pytest.mark.parametrize("seed", range(4))
def test_induced_norm_is_brute_force(seed):
    Phi, before, after = normal(D, D, seed=seed), positive(10 + seed), positive(20 + seed)
    found = induced_norm(Phi, before, after)
    exact = scipy.linalg.eigh((Phi.T @ after @ Phi).numpy(), before.numpy(), eigvals_only=True)[-1]**.5
    assert abs(found.item() - exact) < 1e-9 * exact
    z = normal(20000, D, seed=30 + seed)
    tried = metric_norm(z @ Phi.T, after) / metric_norm(z, before)
    assert tried.max() <= found * (1 + 1e-12)
    for _ in range(200):  # climb from the best one tried: the value is attained
        best = z[tried.argmax()]
        z = best + .3**(_ // 20) * best.norm() * normal(200, D, seed=1000 + _)
        z[0] = best
        tried = metric_norm(z @ Phi.T, after) / metric_norm(z, before)
    assert tried.max() > .9999 * found


@pytest.mark.parametrize("scale", [.3, 1., 3.])
def test_every_loop_contracts_in_its_own_ruler(scale):
    "So contraction there is no evidence of stability: the factor depends on the length of the ruler alone"
    A_hat = scale * normal(L, D, D)
    P = lyapunov_metric(A_hat)
    for t in range(L): torch.testing.assert_close(induced_norm(A_hat[t], P[t], P[t + 1]), (1 - 1/torch.linalg.eigvalsh(P[t])[-1]).sqrt())


def test_curvature_is_zero_for_a_linear_world_and_scales_with_the_bend():
    flat, mild, strong = (Quadratic(bend=b) for b in (0., .1, .2))
    K, A_hat = loops(flat, True)
    P, delta = lyapunov_metric(A_hat), .1*normal(50, D, seed=3)
    assert curvature(A_hat, P, flat.run(K, delta)).max() < 1e-9
    torch.testing.assert_close(curvature(A_hat, P, strong.run(K, delta))[0], 2*curvature(A_hat, P, mild.run(K, delta))[0])
    torch.testing.assert_close(error_bound(A_hat, P, torch.zeros(L).double(), flat.run(K, delta))[0], sizes(flat.run(K, delta), P)[0])


def test_similarity_compares_what_is_written():
    J, m = normal(4, 12, 12), 3
    s = similarity(J, J[:2], m)
    assert s.shape == (4, 2) and (s >= 0).all() and (s <= 1 + 1e-12).all()
    torch.testing.assert_close(s[:2].diagonal(), torch.ones(2).double())
    for i in range(4):
        for k in range(2):
            (U, a, _), (V, b, _) = (np.linalg.svd(x.numpy()) for x in (J[i], J[k]))
            nuclear = np.linalg.svd(np.diag(a[:m]) @ U[:, :m].T @ V[:, :m] @ np.diag(b[:m]), compute_uv=False).sum()
            assert abs(s[i, k].item() - nuclear / np.linalg.norm(a[:m]) / np.linalg.norm(b[:m])) < 1e-10
    Q = torch.linalg.qr(normal(12, 12, seed=5)).Q
    torch.testing.assert_close(similarity(J @ Q, J[:2], m), s)  # another input basis writes the same
    torch.testing.assert_close(similarity(Q @ J, Q @ J[:2], m), s)
    torch.testing.assert_close(similarity(3*J, J[:2], m), s)
    assert similarity(normal(2, 60, 60), normal(2, 60, 60)).shape == (2, 2)  # m = 3 by default
    torch.testing.assert_close(similarity(normal(2, 60, 60), normal(3, 60, 60, seed=1)), similarity(normal(2, 60, 60), normal(3, 60, 60, seed=1), 3))
