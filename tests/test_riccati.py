"The Riccati recursion against other ways to the same optimum: stacked least squares, SciPy, conjugate gradients, brute force"
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from odesteer.control import feature_gains
from odesteer.linear import riccati, riccati_steps

WEIGHTS = [(.1, 1., .1), (.1, 10., 10.), (10., 1., 3.), (0., 1., 2.), (1., .1, 0.), (100., .1, 1000.)]


def blocks(L=6, d=5, scale=.5, seed=0, dtype=torch.float64):
    "Random maps near the identity, as residual blocks are"
    g = torch.Generator().manual_seed(seed)
    return (torch.eye(d, dtype=torch.float64) + scale * torch.randn(L, d, d, generator=g, dtype=torch.float64) / d**.5).to(dtype)


def normal(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simulate(A, start, u, q, r, qf):
    "Cost and path of a plan u (L, d), or of a rule u(t, deviation)"
    x, cost, path = start, 0., [start]
    for t in range(len(A)):
        move = u(t, x) if callable(u) else u[t]
        cost, x = cost + q * x @ x + r * move @ move, A[t] @ x + move
        path.append(x)
    return cost + qf * x @ x, path


def stacked(A, start, q, r, qf):
    "The same optimum as one least-squares problem in all corrections at once, in NumPy"
    L, d = len(A), len(start)
    A = A.numpy()
    def product(i, j): return np.linalg.multi_dot([*A[i:j][::-1], np.eye(d), np.eye(d)]) if j > i else np.eye(d)  # from before block i to before block j
    rows, right = [math.sqrt(r) * np.eye(L * d)], [np.zeros(L * d)]
    for t in range(L + 1):
        weight = math.sqrt(qf if t == L else q)
        rows.append(weight * np.hstack([product(s + 1, t) if s < t else np.zeros((d, d)) for s in range(L)]))
        right.append(-weight * product(0, t) @ start.numpy())
    u, *_ = np.linalg.lstsq(np.vstack(rows), np.concatenate(right), rcond=None)
    return torch.tensor(u).view(L, d)


# ---- the optimum

@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gains_minimise_the_cost(weights):
    A, start = blocks(), normal(5)
    K, best = riccati(A, *weights), stacked(A, start, *weights)
    cost, path = simulate(A, start, lambda t, x: -K[t] @ x, *weights)
    torch.testing.assert_close(torch.stack([-K[t] @ path[t] for t in range(6)]), best, rtol=1e-8, atol=1e-8)
    for i in range(20): assert simulate(A, start, best + 1e-2 * normal(6, 5, seed=i), *weights)[0] > cost


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_cost_is_foreseen_from_every_block(weights):
    A, qf = blocks(), weights[2]
    steps = {t: (K, S) for t, K, S in riccati_steps(A, *weights)}
    for t in steps:
        start = normal(5, seed=t)
        cost, path = simulate(A[t:], start, lambda s, x: -steps[t + s][0] @ x, *weights)
        torch.testing.assert_close(start @ steps[t][1] @ start, cost)
        values = [x @ steps[t + s][1] @ x for s, x in enumerate(path[:-1])] + [qf * path[-1] @ path[-1]]
        assert all(b <= a + 1e-12 for a, b in zip(values, values[1:])), "what is still to pay never grows along the closed loop"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_costs_are_symmetric_and_at_least_q(weights):
    for t, K, S in riccati_steps(blocks(), *weights):
        assert torch.equal(S, S.T) and torch.linalg.eigvalsh(S).min() > weights[0] - 1e-10 * max(weights)


@pytest.mark.parametrize("weights", [(.1, 1., .1), (10., 1., 3.), (1., 10., 0.)], ids=str)
def test_long_horizon_is_the_algebraic_equation(weights):
    q, r, qf = weights
    A, I = 1.05 * blocks(1, 6)[0], np.eye(6)
    S = scipy.linalg.solve_discrete_are(A.numpy(), I, q * I, r * I)
    *_, (t, K, S0) = riccati_steps([A] * 400, q, r, qf)
    assert t == 0
    np.testing.assert_allclose(S0, S, rtol=1e-8)
    np.testing.assert_allclose(K, np.linalg.solve(S + r * I, S @ A.numpy()), rtol=1e-7, atol=1e-9)


# ---- identities, invariances, limits

@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_other_forms_of_the_same_gain(weights):
    A, (q, r, qf) = blocks(), weights
    I, after = torch.eye(5, dtype=torch.float64), qf * torch.eye(5, dtype=torch.float64)
    for t, K, S in riccati_steps(A, *weights):
        M = torch.linalg.inv(after + r * I)
        torch.testing.assert_close(K, M @ after @ A[t])  # the textbook
        torch.testing.assert_close(A[t] - K, r * M @ A[t])  # the closed loop
        torch.testing.assert_close(S, q * I + A[t].T @ after @ A[t] - (after @ A[t]).T @ K)  # the textbook
        torch.testing.assert_close(S, q * I + K.T @ K * r + (A[t] - K).T @ after @ (A[t] - K))  # Joseph's form
        after = S


def test_only_ratios_matter():
    for a, b in zip(riccati(blocks(), .1, 10., 10.), riccati(blocks(), .01, 1., 1.)): torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for (_, _, a), (_, _, b) in zip(riccati_steps(blocks(), .1, 10., 10.), riccati_steps(blocks(), .01, 1., 1.)): torch.testing.assert_close(a, 10 * b)


def test_limits():
    A = blocks()
    torch.testing.assert_close(riccati(A, 3., 2., .5)[-1], .5 / 2.5 * A[-1])
    for K, A_t in zip(riccati(A, 1., 1e-9, 1.), A): torch.testing.assert_close(K, A_t, rtol=0, atol=1e-6)
    for K in riccati(A, 1., 1e9, 1.): assert K.norm() < 1e-6
    for K in riccati(A, 0., 1., 0.): assert (K == 0).all()
    sizes = [torch.stack(riccati(A, 1., r, 1.)).norm() for r in (.1, 1., 10., 100.)]
    assert sizes == sorted(sizes, reverse=True)


def test_change_of_basis():
    "Gains turn with the coordinates"
    A, (Q, _) = blocks(), torch.linalg.qr(normal(5, 5))
    for K, turned in zip(riccati(A), riccati(Q @ A @ Q.T)): torch.testing.assert_close(turned, Q @ K @ Q.T)


def test_a_multiple_of_the_identity_is_a_number():
    many, one = riccati(1.3 * torch.eye(4, dtype=torch.float64).expand(7, 4, 4), .2, 1., 3.), riccati(torch.full((7, 1, 1), 1.3, dtype=torch.float64), .2, 1., 3.)
    for K, k in zip(many, one): torch.testing.assert_close(K, k * torch.eye(4, dtype=torch.float64))


# ---- how it computes

class Lazy:
    "Makes a matrix when asked, and remembers what it was asked for"
    def __init__(self, A): self.A, self.asked = A, []
    def __len__(self): return len(self.A)
    def __getitem__(self, t): self.asked.append(t); return self.A[t]


def test_matrices_are_asked_for_once_backwards_and_when_needed():
    A = Lazy(blocks())
    steps = riccati_steps(A)
    assert not A.asked and next(steps)[0] == 5 and A.asked == [5]
    assert [t for t, *_ in steps] == A.asked[1:] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("q", [1e-5, .1, 1e4])
def test_float32_is_enough(q):
    A = blocks(32, 64)
    for K, exact in zip(riccati(A.float(), q, 1., q), riccati(A, q, 1., q)):
        assert K.dtype == torch.float32 and (K - exact).norm() < 3e-5 * exact.norm()


def test_dtype_asked_for(): assert all(K.dtype == S.dtype == torch.float64 for _, K, S in riccati_steps(blocks(dtype=torch.float32), dtype=torch.float64))


@pytest.mark.parametrize("change, error, message", [
    (dict(A=blocks(dtype=torch.bfloat16)), TypeError, "bfloat16: the recursion needs float32 or float64"),
    (dict(A=blocks(dtype=torch.float16)), TypeError, "float16"),
    (dict(A=torch.ones(3, 2, 4)), ValueError, r"A\[2\] must be a square matrix.*\(2, 4\)"),
    (dict(A=[torch.eye(3), torch.eye(4)]), ValueError, r"A\[0\] has shape \(3, 3\), but the matrix after it has \(4, 4\)"),
    (dict(A=torch.full((2, 3, 3), math.nan)), ValueError, r"A\[1\] holds NaN"),
    (dict(r=0.), ValueError, "r=0.0 is no weight"), (dict(r=-1.), ValueError, "r=-1.0"), (dict(q=-.1), ValueError, "q=-0.1"), (dict(qf=math.inf), ValueError, "qf=inf"),
    (dict(q=math.nan), ValueError, "q=nan"), (dict(q=True), ValueError, "q=True"),
], ids=str)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message): riccati(**{"A": blocks(), **change})


# ---- only the feature counts

def dense_feature_gains(A, V, q, r, qf):
    "The recursion with full matrices, textbook form and explicit inverse"
    S, W = qf * V[-1].T @ V[-1], [None] * len(A)
    for t in reversed(range(len(A))):
        K = torch.linalg.inv(S + r * torch.eye(len(S), dtype=S.dtype)) @ S @ A[t]
        S = q * V[t].T @ V[t] + A[t].T @ S @ A[t] - (S @ A[t]).T @ K
        W[t] = V[t] @ K.T
    return torch.stack(W)


class Probes:
    "The two products only, and how many rows were asked for"
    def __init__(self, A): self.A, self.rows = A, {"jvp": [], "vjp": []}
    def jvp(self, t, Z): self.rows["jvp"].append(len(Z)); return (Z.double() @ self.A[t].T).to(Z)
    def vjp(self, t, Z): self.rows["vjp"].append(len(Z)); return (Z.double() @ self.A[t]).to(Z)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_feature_gains_are_those_of_the_dense_recursion(weights, m):
    A, V = blocks(7, 12), torch.nn.functional.normalize(normal(8, m, 12), dim=-1)
    W = feature_gains(A, V, *weights)
    stiff = max(weights) / weights[1]  # the reference subtracts matrices so much larger than what is left
    torch.testing.assert_close(W, dense_feature_gains(A, V, *weights), rtol=1e-10, atol=1e-12 * max(100, stiff))
    if m == 1: assert torch.equal(feature_gains(A, V[:, 0], *weights), W[:, 0])


def test_feature_gains_ask_for_few_rows():
    A, V = blocks(7, 12), torch.nn.functional.normalize(normal(8, 12), dim=-1)
    probes = Probes(A)
    torch.testing.assert_close(feature_gains(probes, V), feature_gains(A, V), rtol=1e-4, atol=1e-6)
    assert probes.rows == {"jvp": [1] * 7, "vjp": [1, 2, 3, 4, 5, 6, 7]}


def test_rank_cap():
    A, V = blocks(9, 12, scale=.2), torch.nn.functional.normalize(1 + .3 * normal(10, 12), dim=-1)
    exact = feature_gains(A, V, 1., 1., 1.)
    off = [(feature_gains(A, V, 1., 1., 1., rank=k) - exact).norm() / exact.norm() for k in (1, 2, 4, 12)]
    assert off == sorted(off, reverse=True) and off[0] > 1e-3 > 1e-9 > off[-1] and off[0] < .2
    probes = Probes(A)
    feature_gains(probes, V, rank=2)
    assert max(probes.rows["vjp"]) == 2


# ---- no matrix at all: conjugate gradients on the corrections, with one sweep forward and one back per product

@pytest.mark.parametrize("weights", [(.1, 10., .1), (.1, 1., .1), (1., 1., 1.)], ids=str)
def test_matrix_free_solution(weights):
    (q, r, qf), A, v = weights, blocks(8, 20, scale=.3), torch.nn.functional.normalize(normal(20), dim=0)
    K = riccati(A, *weights)
    def gradient(t, start, u):
        "Half the derivative of the cost by the corrections, from products with A and A^T only"
        path = [start]
        for s in range(t, len(A)): path.append(A[s] @ path[-1] + u[s - t])
        pull, out = qf * path[-1], []
        for s in reversed(range(t, len(A))): out.append(r * u[s - t] + pull); pull = q * path[s - t] + A[s].T @ pull
        return torch.stack(out[::-1])
    for t in (0, 4, 7):
        u = torch.zeros(len(A) - t, 20, dtype=torch.float64)
        residual = p = -gradient(t, -v, u)
        for n in range(200):
            Hp = gradient(t, torch.zeros_like(v), p)
            step = (residual * residual).sum() / (p * Hp).sum()
            u, new = u + step * p, residual - step * Hp
            if new.norm() < 1e-12: break
            residual, p = new, new + (new * new).sum() / (residual * residual).sum() * p
        torch.testing.assert_close(u[0], K[t] @ v, rtol=1e-8, atol=1e-9)
        assert n < 100 and (n <= 1 or t < 7), "one step suffices where one block is left"
