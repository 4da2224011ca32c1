"""Held-back checks of assignment 1, for `python -m tests.grade`.

A function is named after the answer that it is about; its parameters are names that the notebook defines."""
import math

import torch
import odesteer as ods
from odesteer.barrier import GaussianBarrier, LinearBarrier, ScoreBarrier, certificate
from odesteer.euler import Steerer

g = torch.Generator().manual_seed(1)
rows = torch.randn(30, 4, generator=g)
A = torch.randn(4, 4, generator=g) / 2
flat = torch.randn(50, 2, generator=g) * 1.5
pos, neg = torch.randn(60, 4, generator=g) + 1, torch.randn(60, 4, generator=g)
def linear(a): return a @ A.to(a.dtype)


def A1_any_field(flow):
    for T, n in ((1.3, 1), (-.7, 6), (2., 30)): assert torch.allclose(flow(linear, rows, T, n), ods.integrate(linear, rows, T, n), rtol=1e-4, atol=1e-4), "another field"

def A1_any_shape(flow):
    batch, T = rows.reshape(2, 15, 4), torch.linspace(-1, 1, 30).reshape(2, 15)
    assert flow(linear, batch, 1., 3).shape == batch.shape, "the shape (2, 15, d)"
    assert torch.allclose(flow(linear, batch, T, 3), ods.integrate(linear, batch, T, 3), atol=1e-5), "a strength for each of (2, 15) tokens"
    assert flow(linear, rows.double(), 1., 3).dtype == torch.float64, "float64 must stay float64"

def A1_leaves_its_input_alone(flow):
    before = rows.clone()
    assert torch.allclose(flow(linear, rows, 1., 3), ods.integrate(linear, rows, 1., 3), atol=1e-5), "three steps"
    assert torch.equal(before, rows), "the activations that were given are changed"


def _miss(T, n):
    def turn(a): return torch.stack([-a[..., 1], a[..., 0]], -1) / a.norm(dim=-1, keepdim=True)
    end = ods.integrate(turn, torch.tensor([[1., 0.]], dtype=torch.float64), T, n)
    return (end - torch.tensor([[math.cos(T), math.sin(T)]], dtype=torch.float64)).norm()

def A2_other_angles(steps_for):
    for T, tol in ((3., .02), (-.5, .01), (.1, .2)):
        n = steps_for(T, tol)
        assert _miss(T, n) <= tol and (n == 1 or _miss(T, n - 1) > tol), f"T = {T}, tol = {tol}"


def B1_a_turn(derivatives):
    def turn(a, T): return torch.stack([a[:, 0]*T.cos() - a[:, 1]*T.sin(), a[:, 0]*T.sin() + a[:, 1]*T.cos()], -1)
    v, acc = derivatives(turn, flat, .4)
    at = turn(flat, torch.tensor(.4))
    assert torch.allclose(acc, -at, atol=1e-5) and torch.allclose(v, torch.stack([-at[:, 1], at[:, 0]], -1), atol=1e-5), "a turn accelerates towards the centre"

def B1_at_the_strength_asked_for(derivatives):
    v, acc = derivatives(lambda a, T: a + T**3 * pos[:1], neg, .5)
    assert torch.allclose(v, .75*pos[:1].expand_as(neg), atol=1e-5) and torch.allclose(acc, 3*pos[:1].expand_as(neg), atol=1e-5), "both are asked for at the strength T"
    s = ods.make_steerer("mimic").fit(pos, neg)
    assert torch.allclose(derivatives(s.steer, neg, .3)[0], s.vector_field(neg), atol=1e-4), "the velocity of a map is its field"


def B2_methods_unseen(is_one_step):
    for name in ("random", "mimic", "linact", "odesteer-step"):
        if name in ods.steerer_names(): assert is_one_step(ods.make_steerer(name).fit(pos, neg).steer, neg) is True, f"{name} is one step, though its velocity may differ from row to row"

def B2_looks_at_more_than_one_strength(is_one_step):
    assert is_one_step(lambda a, T: a + T**3 * pos[:1], neg) is False, "an acceleration that vanishes at T = 0 only"
    class Decay(Steerer):
        def _fit(self, data): pass
        def _field(self, x): return -x
        def _flow(self, x, T): return x * torch.exp(-T)[..., None]
    assert is_one_step(Decay().fit(pos, neg).steer, neg) is False, "a decay"


def C1_other_rings(Ring, climb):
    for r, w in ((1., .2), (3., 1.)):
        a = flat + torch.tensor([.05, 0.])
        assert torch.allclose(Ring(r, w).value(a), w**2 - (a.norm(dim=-1) - r)**2, atol=1e-5), "another ring"
        path = climb(Ring(r, w), a, 6., 600)
        assert ((path[-1].norm(dim=-1) - r).abs() < .02).all(), "rows do not end on the ring"

def C1_any_barrier(climb):
    path = climb(LinearBarrier(torch.tensor([3., 4.]), -1.), flat, 2., 7)
    assert torch.allclose(path[-1], flat + 2*torch.tensor([.6, .8]), atol=1e-5), "a linear barrier"


def C2_another_curvature(careful):
    h = ScoreBarrier(lambda a: -3*a[..., 0]**2 - .5*a[..., 1]**2)  # the gradient changes by at most 6 per unit of length
    path = careful(h, 6., flat, 3., 60)
    assert certificate(h, path, tol=1e-5).share_monotone == 1, "h falls on a stretched hill"
    assert (path[-1].norm(dim=-1) < flat.norm(dim=-1)).all(), "rows hardly move on a stretched hill"

def C2_no_time_wasted(careful):
    path = careful(LinearBarrier(torch.tensor([3., 4.]), 0.), 1e-3, flat, 2., 40)
    assert torch.allclose(path[1], flat + 2*torch.tensor([.6, .8]), atol=1e-4), "where nothing bends one step may take all the time"

def C2_gaussians(careful):
    h = GaussianBarrier(torch.tensor([1., 0.]), torch.tensor([-1., 0.]), .5*torch.eye(2), torch.eye(2))  # its Hessian is minus the identity
    assert certificate(h, careful(h, 1., flat, 5., 60), tol=1e-4).share_monotone == 1, "h falls between two Gaussians"


def D1_unseen_steps(order):
    def heun(f, a, dt):
        k = f(a)
        return a + dt/2*(k + f(a + dt*k))
    def ralston(f, a, dt):
        k1 = f(a)
        k2 = f(a + dt/2*k1)
        k3 = f(a + 3*dt/4*k2)
        return a + dt/9*(2*k1 + 3*k2 + 4*k3)
    def wrong(f, a, dt): return a + dt*f(a + .3*dt*f(a))  # looks ahead, and not to the middle
    for step, q in ((heun, 2), (ralston, 3), (wrong, 1)): assert abs(order(step) - q) < .3, f"{step.__name__} has order {q}"
