"What every steerer of the registry promises, whatever its method"
import copy
import json
import math
import os
import random
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import odesteer as ods

from .project import rewrite

D, N_POS, N_NEG = 16, 60, 50
SMALL = {"odesteer": dict(n_components=128), "step-odesteer": dict(n_components=128), "hpr": dict(epochs=5, lr=3e-3), "recontrol": dict(epochs=20),
         "truthflow": dict(epochs=20, lr=3e-3)}  # hyper-parameters that make a method quick to fit
PLACEBOS = ods.steerer_names(kind="placebo")  # promise everything but a direction that is right
MADE = ["vector", "ablation"]  # can also be made without data
# What code common to all methods refuses, before a method sees it, is tried on the plainest and the richest method.
common = pytest.mark.parametrize("name", ["caa", "odesteer"], indirect=True)


def made(name, **extra): return ods.make_steerer(name, **{**SMALL.get(name, {}), **extra})


@pytest.fixture(scope="module")
def data():
    "Answers to questions: wanted and unwanted activations with everything that a method may ask for"
    g = torch.Generator().manual_seed(0)
    def normal(*shape): return torch.randn(*shape, generator=g)
    question, shift = 2 * normal(N_POS, D) + 1, 1.5 * normal(D)
    pos, neg = question + shift + .5 * normal(N_POS, D), question[:N_NEG] + .5 * normal(N_NEG, D)
    sequences = [torch.cat([normal(3, D), x[None]]) for x in torch.cat([pos, neg])]
    return dict(pos=pos, neg=neg, groups=[*range(N_POS), *range(N_NEG)], pairs=[[i, i] for i in range(N_NEG)], source=question[:N_NEG],
                sequences=sequences, rewards=torch.cat([torch.ones(N_POS), torch.zeros(N_NEG)]))


@pytest.fixture(scope="module", params=ods.steerer_names() + PLACEBOS + MADE)
def name(request): return request.param


@pytest.fixture(scope="module")
def steerer(name, data): return made(name).fit(**data)


@pytest.fixture(scope="module")
def a(data): return data["neg"][:7]


@pytest.fixture
def folder(steerer, tmp_path):
    steerer.save_pretrained(tmp_path)
    return tmp_path


def same_field(x, y, a, **kw): torch.testing.assert_close(x.steer(a, T=1.5), y.steer(a, T=1.5), **kw)


# ---- the motion

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_strength_is_the_identity_bit_for_bit(steerer, a, dtype):
    a = a.to(dtype, copy=True)
    a[0, 0] = -0.
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    for zero in 0, 0., -0., torch.tensor(0.), torch.zeros(7):
        for unit in "T", "share", "spread":
            assert torch.equal(steerer.steer(a, **{unit: zero}).view(bits), a.view(bits)), (unit, zero)


def test_shapes(steerer):
    for shape in (D,), (1, D), (7, D), (2, 3, D), (0, D), (2, 0, D), (2, 1, 3, D):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert steerer.steer(x, T=1.).shape == steerer.vector_field(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_follows_the_activation_and_the_maths_is_float32_or_better(steerer, a, dtype):
    x = a.to(dtype)
    assert steerer.steer(x, T=1.).dtype == steerer.vector_field(x).dtype == dtype
    if dtype.itemsize == 2: assert torch.equal(steerer.steer(x, T=1.), steerer.steer(x.float(), T=1.).to(dtype))
    else: torch.testing.assert_close(steerer.steer(x, T=1.).double(), steerer.steer(a.double(), T=1.), rtol=1e-5, atol=1e-5)


def test_the_field_is_the_derivative_of_steer_at_zero(steerer, a):
    x, eps = a.double(), 1e-4
    slope = (steerer.steer(x, T=eps) - steerer.steer(x, T=-eps)) / (2 * eps)
    torch.testing.assert_close(slope, steerer.vector_field(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_a_row_does_not_see_its_neighbours(steerer, n, seed, T):
    x = 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together, apart = steerer.steer(x, T=T), torch.stack([steerer.steer(row, T=T) for row in x])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


def test_a_strength_for_every_row(steerer, a):
    T = torch.tensor([0., 1., -1., .5, 2., 0., 3.])
    out = steerer.steer(a, T=T)
    torch.testing.assert_close(out, torch.stack([steerer.steer(x, T=t.item()) for x, t in zip(a, T)]), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[T == 0], a[T == 0]) and not (out[T != 0] == a[T != 0]).all(-1).any()


def test_a_strength_for_a_prefix_of_the_rows(steerer, a):
    x = a[:6].reshape(2, 3, D)
    T = torch.tensor([1., 2.])
    torch.testing.assert_close(steerer.steer(x, T=T), steerer.steer(x, T=T[:, None].expand(2, 3)))
    assert steerer.steer(x, T=torch.ones(2, 3)).shape == x.shape


def test_integer_strengths_mean_the_same(steerer, a):
    for T in 2, torch.tensor(2), np.float32(2): assert torch.equal(steerer.steer(a, T=T), steerer.steer(a, T=2.))


def test_share_is_a_displacement_over_the_median_norm(steerer, a):
    T = .3 * steerer.median_norm_ / steerer.displacement_
    torch.testing.assert_close(steerer.steer(a, share=.3), steerer.steer(a, T=T))
    if steerer.unit == "length": assert steerer.displacement_ == 1


def spread_by_hand(*classes):
    "The median distance to the mean, in float64 and row by row; of an even number of distances the lower middle one"
    rows = np.concatenate([np.asarray(x, dtype=np.float64) for x in classes])
    distances = sorted(math.dist(row, rows.mean(0)) for row in rows)
    return distances[(len(distances) - 1) // 2]


def test_spread_is_the_median_distance_to_the_mean(steerer, data, a):
    assert steerer.spread_.item() == pytest.approx(spread_by_hand(data["pos"], data["neg"]), rel=1e-5)
    T = 1.3 * steerer.spread_ / steerer.displacement_
    torch.testing.assert_close(steerer.steer(a, spread=1.3), steerer.steer(a, T=T))
    torch.testing.assert_close(steerer.steer(a, spread=-.4), steerer.steer(a, T=-.4 * steerer.spread_ / steerer.displacement_))
    each = torch.tensor([0., 1., -1., .5, 2., 0., 3.])
    torch.testing.assert_close(steerer.steer(a, spread=each), torch.stack([steerer.steer(x, spread=s.item()) for x, s in zip(a, each)]), rtol=1e-5, atol=1e-5)
    assert steerer.strength_units[:3] == ("T", "share", "spread") and f"spread {steerer.spread_:.4g}" in repr(steerer)


@pytest.mark.parametrize("name", ["caa", "iti", "repe", "random"], indirect=True)
def test_a_constant_field_moves_every_row_by_the_spreads_asked_for(steerer, a):
    for s in .25, 1., -2.:
        moved = (steerer.steer(a.double(), spread=s) - a.double()).norm(dim=-1)
        torch.testing.assert_close(moved, torch.full_like(moved, abs(s) * steerer.spread_.item()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["caa", "iti"], indirect=True)
def test_an_offset_common_to_all_changes_shares_and_no_spread(name, steerer, data):
    pos, neg, offset = data["pos"].double(), data["neg"].double(), torch.zeros(D, dtype=torch.float64)
    offset[3] = 200.
    here, there = made(name).fit(pos, neg), made(name).fit(pos + offset, neg + offset)
    torch.testing.assert_close(there.spread_, here.spread_, rtol=1e-9, atol=0)
    assert there.median_norm_ > 10 * here.median_norm_
    far = {unit: (there.steer(neg + offset, **{unit: .5}) - offset - here.steer(neg, **{unit: .5})).norm(dim=-1).max() for unit in ("spread", "share")}
    assert far["spread"] < 1e-4 and far["share"] > 10


@common
def test_spread_in_every_precision(name, data, a):
    wide = made(name).fit(data["pos"].double(), data["neg"].double())
    assert wide.spread_.dtype == torch.float64 and wide.spread_.item() == pytest.approx(spread_by_hand(data["pos"], data["neg"]), rel=1e-12)
    for dtype in torch.float16, torch.bfloat16:
        pos, neg = data["pos"].to(dtype), data["neg"].to(dtype)
        s = made(name).fit(pos, neg)
        assert s.spread_.dtype == torch.float32 and s.spread_.item() == pytest.approx(spread_by_hand(pos.double(), neg.double()), rel=1e-5)
        out = s.steer(a.to(dtype), spread=1.)
        assert out.dtype == dtype and torch.equal(out, s.steer(a.to(dtype).float(), spread=1.).to(dtype))


@common
def test_a_steerer_from_before_there_were_spreads(name, folder, data, a):
    new = ods.load_steerer(folder)
    rewrite(folder, tensors=lambda t: {k: v for k, v in t.items() if k != "spread_"})
    old = ods.load_steerer(folder)
    for how in dict(T=1.5), dict(share=.3): assert torch.equal(old.steer(a, **how), new.steer(a, **how))
    assert "spread" not in old.strength_units and "spread" not in repr(old) and old.default_strength == ({"T": 1.} if old.unit == "fraction" else {"share": .5})
    for use in (lambda: old.steer(a, spread=1.), lambda: old.edits(None, 0, {"spread": 1.}), lambda: old.resolve({"spread": 1.})):
        with pytest.raises(ValueError, match="knows no spread: it was saved by an older odesteer, or its activations were all the same; fit it again"): use()
    old.save_pretrained(folder)
    assert torch.equal(old.fit(**data).spread_, new.spread_)


@pytest.mark.parametrize("d, size", [(3, 1.), (4096, 1e3)])
def test_activations_that_are_all_the_same_have_no_spread(d, size):
    row = size * torch.randn(1, d, generator=torch.Generator().manual_seed(0))
    barrier = ods.ScoreBarrier(lambda x: x.sum(-1))
    s = ods.ODESteer(barrier=barrier).fit(row.expand(5, d), row.expand(7, d))
    with pytest.raises(ValueError, match="knows no spread"): s.steer(row, spread=1.)
    torch.testing.assert_close((s.steer(row, T=1.) - row).norm(), torch.tensor(1.), rtol=1e-2, atol=0)
    apart = row + 1e-2 * size * torch.randn(12, d, generator=torch.Generator().manual_seed(1))
    assert s.fit(apart[:5], apart[5:]).spread_ > 0 and torch.equal(s.fit(row.expand(5, d), row.expand(7, d)).steer(row, T=0.), row) and "spread" not in s.strength_units


def test_typical_norm_and_displacement(steerer, data):
    both = torch.cat([data["pos"], data["neg"]])
    torch.testing.assert_close(steerer.median_norm_, both.norm(dim=-1).median())
    assert steerer.width == D
    if steerer.unit == "fraction":
        query = {"source": data["source"]} if getattr(steerer, "per_query_", False) else {}  # one state per pair: here those of neg
        moved = (steerer.steer(data["neg"], T=1., **query) - data["neg"]).norm(dim=-1)
        torch.testing.assert_close(steerer.displacement_, moved[moved > 0].median())  # a gated map leaves some where they are


def test_a_published_map_knows_its_strength(steerer, a):
    if steerer.unit == "fraction": return torch.testing.assert_close(steerer.steer(a), steerer.steer(a, T=1.))
    for strength in steerer.steer, lambda a: steerer.edits(None, 0, None):
        with pytest.raises(ValueError, match=re.escape(f"spread= (in units of {steerer.spread_:.4g}; .5 to 1 is usual), T= (a distance)")): strength(a)
        with pytest.raises(ValueError, match=re.escape(f"share= (of {steerer.median_norm_:.4g}, the median norm of the fitted activations)")): strength(a)


def test_steering_raises_the_share_of_wanted_projections(name, steerer, data):
    if name in PLACEBOS: pytest.skip("a placebo points anywhere")
    u = data["pos"].mean(0) - data["neg"].mean(0)
    assert ((steerer.steer(data["neg"], share=.2) - data["neg"]) @ u).mean() > 0


def test_gradients_flow_through_steer(steerer, a):
    x = a.double().requires_grad_()
    steerer.steer(x, T=.5).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).any()


def test_works_in_inference_mode(steerer, a):
    with torch.inference_mode(): inside = steerer.steer(a.clone(), T=1.)
    assert torch.equal(inside.clone(), steerer.steer(a, T=1.))


# ---- the fit

def test_fit_returns_the_steerer_and_says_so(name, data):
    s = made(name)
    assert "not fitted" in repr(s) and s.fit(**data) is s
    assert f"fitted on {N_POS} + {N_NEG} activations of width {D}" in repr(s)


def test_labels_and_two_tables_give_the_same_fit(name, steerer, data, a):
    order = torch.randperm(N_POS + N_NEG, generator=torch.Generator().manual_seed(3))
    order = order[torch.argsort(torch.where(order < N_POS, order, order - N_POS), stable=True)]  # mixed classes, in each class the old order
    X, y = torch.cat([data["pos"], data["neg"]])[order], (order < N_POS).long()
    rest = {k: v for k, v in data.items() if k not in ("pos", "neg", "groups")}
    labelled = made(name).fit(X, y, groups=np.asarray(data["groups"])[order], **rest)
    assert torch.equal(labelled.steer(a, T=1.), steerer.steer(a, T=1.)) and labelled.card["fit"] == steerer.card["fit"]


def test_arrays_and_lists_are_as_good_as_tensors(name, steerer, data, a):
    arrays = made(name).fit(data["pos"].numpy(), data["neg"].tolist(), **{k: v for k, v in data.items() if k not in ("pos", "neg")})
    assert torch.equal(arrays.steer(a, T=1.), steerer.steer(a, T=1.))
    torch.testing.assert_close(torch.as_tensor(arrays.steer(a.numpy(), T=1.)), steerer.steer(a, T=1.))


def test_fitting_again_gives_the_same_and_forgets_the_past(name, steerer, data, a):
    again = made(name).fit(**{**data, "pos": data["neg"] + 3, "neg": data["neg"], "groups": [*range(N_NEG)] * 2, "sequences": None, "rewards": None})
    again.steer(a.double(), T=1.)  # makes a float64 copy, which must not outlive the next fit
    again.fit(**data)
    assert torch.equal(again.steer(a, T=1.), steerer.steer(a, T=1.)) and torch.equal(again.steer(a.double(), T=1.), steerer.steer(a.double(), T=1.))


def test_half_precision_data_are_fitted_in_float32(name, data, a):
    half = {**data, "pos": data["pos"].bfloat16(), "neg": data["neg"].bfloat16()}
    wide = {**data, "pos": half["pos"].float(), "neg": half["neg"].float()}
    assert torch.equal(made(name).fit(**half).steer(a, T=1.), made(name).fit(**wide).steer(a, T=1.))


def test_float64_data_are_fitted_in_float64(name, steerer, data, a):
    wide = made(name).fit(**{**data, "pos": data["pos"].double(), "neg": data["neg"].double()})
    assert wide.median_norm_.dtype == torch.float64 and wide.steer(a, T=1.).dtype == torch.float32
    same_field(wide, steerer, a, rtol=1e-4, atol=1e-4)


def test_leaves_data_and_activations_as_they_were(name, data, a):
    def copies(): return {k: copy.deepcopy(v) for k, v in data.items()}
    before, x = copies(), a.clone()
    s = made(name).fit(**data)
    s.steer(x, T=1.), s.vector_field(x)
    for k, v in before.items():
        equal = all(map(torch.equal, v, data[k])) if k == "sequences" else torch.equal(v, data[k]) if isinstance(v, torch.Tensor) else v == data[k]
        assert equal, k
    assert torch.equal(x, a)


def test_leaves_global_generators_alone_and_does_not_depend_on_them(name, steerer, data, a):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # the states are compared, nothing is drawn or seeded
    out = made(name).fit(**data).steer(a, T=1.)
    assert random.getstate() == states[0] and all(map(np.array_equal, np.random.get_state(), states[1])) and torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(out, steerer.steer(a, T=1.))


def test_seed_decides(name, steerer, data, a):
    if "seed" not in steerer.params: pytest.skip("nothing is drawn")
    assert torch.equal(made(name, seed=steerer.params["seed"]).fit(**data).steer(a, T=1.), steerer.steer(a, T=1.))
    assert not torch.equal(made(name, seed=steerer.params["seed"] + 1).fit(**data).steer(a, T=1.), steerer.steer(a, T=1.))


# ---- bad input

def test_what_is_tried_on_few_methods_is_the_same_code_in_all(name):
    method = type(made(name))
    for part in "fit", "_ready", "_check", "_given", "_check_tensors", "_try_once", "save_pretrained": assert getattr(method, part) is getattr(ods.Steerer, part), part
    assert method._time in (ods.Steerer._time, ods.ODESteer._time)
    assert method.from_pretrained.__func__ is ods.Steerer.from_pretrained.__func__
    assert (method.steer is ods.Steerer.steer) == (name != "truthflow")


BAD_FITS = {
    "a NaN": (lambda p, n: (p, torch.where(torch.arange(N_NEG)[:, None] == 3, torch.nan, n)), ValueError, "neg holds NaN or infinity in 1 of 50 rows (first: row 3)"),
    "infinity": (lambda p, n: (p / torch.zeros(()), n), ValueError, "pos holds NaN or infinity in 60 of 60 rows"),
    "an empty class": (lambda p, n: (p, n[:0]), ValueError, "neg is empty"),
    "no width": (lambda p, n: (p[:, :0], n), ValueError, "pos is empty"),
    "two widths": (lambda p, n: (p, n[:, :5]), ValueError, "pos has width 16 but neg has width 5"),
    "integers": (lambda p, n: (p.long(), n), TypeError, "pos must hold floats; got torch.int64"),
    "one row": (lambda p, n: (p[0], n), ValueError, "pos must have shape (N, d), one row per activation; got (16,)"),
    "no table": (lambda p, n: ("pos.pt", n), TypeError, "pos must be an array or tensor of shape (N, d); got str"),
    "too few labels": (lambda p, n: (p, [0, 1]), ValueError, "60 activations but 2 labels"),
    "one label": (lambda p, n: (p, torch.ones(60)), ValueError, "all 60 labels are 1: both classes are needed"),
    "three labels": (lambda p, n: (p, np.arange(60) % 3), ValueError, "labels must be 0 (unwanted) or 1 (wanted); got [0, 1, 2]"),
}


@common  # `contrast` refuses: no method has a `fit` of its own
@pytest.mark.parametrize("bad", BAD_FITS)
def test_bad_data(name, data, bad):
    change, error, message = BAD_FITS[bad]
    with pytest.raises(error, match=re.escape(message)): made(name).fit(*change(data["pos"], data["neg"]))


def test_a_fit_that_fails_leaves_nothing_half_done(name, data, a):
    s = made(name).fit(**data)
    s._fit = lambda data: 1 / 0
    with pytest.raises(ZeroDivisionError): s.fit(**data)
    with pytest.raises(RuntimeError, match="not fitted: call .fit"): s.steer(a, T=1.)


def test_unfitted(name, a, tmp_path):
    s = made(name)
    for use in (lambda: s.steer(a, T=1.), lambda: s.vector_field(a), lambda: s.save_pretrained(tmp_path), lambda: s.edits(None, 0, 1.)):
        with pytest.raises(RuntimeError, match="is not fitted: call .fit"): use()


BAD_STEERS = {
    "integers": (lambda a: (a.long(),), dict(T=1.), TypeError, "activations must be floats; got torch.int64"),
    "another width": (lambda a: (a[:, :5],), dict(T=1.), ValueError, "was fitted on activations of width 16; got shape (7, 5)"),
    "a scalar": (lambda a: (a[0, 0],), dict(T=1.), ValueError, "got shape ()"),
    "too many strengths": (lambda a: (a,), dict(T=torch.ones(3)), ValueError, "T must be a number or have one value per row: shape (7,) or a prefix of it; got (3,)"),
    "a strength per entry": (lambda a: (a,), dict(share=torch.ones(7, D)), ValueError, "share must be a number or have one value per row"),
    "a yes": (lambda a: (a,), dict(T=True), TypeError, "T must be a number or a float tensor; got torch.bool"),
    "a word": (lambda a: (a,), dict(T="strong"), TypeError, "T must be a number or a float tensor; got 'strong'"),
    "infinity": (lambda a: (a,), dict(T=float("inf")), ValueError, "T must be finite; got inf"),
    "no number": (lambda a: (a,), dict(share=float("nan")), ValueError, "share must be finite; got nan"),
    "a spread per entry": (lambda a: (a,), dict(spread=torch.ones(7, D)), ValueError, "spread must be a number or have one value per row"),
    "a spread of no number": (lambda a: (a,), dict(spread=float("nan")), ValueError, "spread must be finite; got nan"),
    "an endless spread": (lambda a: (a,), dict(spread=float("inf")), ValueError, "spread must be finite; got inf"),
    "a word for a spread": (lambda a: (a,), dict(spread="one"), TypeError, "spread must be a number or a float tensor; got 'one'"),
    "two distances": (lambda a: (a,), dict(share=.3, spread=1.), ValueError, "give one unit of strength, not spread and share"),
    "two units": (lambda a: (a,), dict(T=1., share=.3), ValueError, "give one unit of strength, not T and share"),
    "two units of which one is 0": (lambda a: (a,), dict(T=0, nats=1.), ValueError, "give one unit of strength, not T and nats"),
    "two goals": (lambda a: (a,), dict(nats=1., until=0.), ValueError, "give one unit of strength, not nats and until"),
}


@pytest.mark.parametrize("name", ["caa", "odesteer", "truthflow"], indirect=True)  # `_ready` and `_time` refuse; the last has a `steer` of its own
@pytest.mark.parametrize("bad", BAD_STEERS)
def test_bad_steering(steerer, a, bad):
    change, strength, error, message = BAD_STEERS[bad]
    with pytest.raises(error, match=re.escape(message)): steerer.steer(*change(a), **strength)


def test_without_a_barrier_there_is_no_level(steerer, a):
    if hasattr(steerer, "stop_at"): pytest.skip("has a barrier")
    for level in dict(until=0.), dict(nats=1.), dict(until=0., T=3.):
        with pytest.raises(ValueError, match="has no barrier to stop at: use T=,? (or )?spread="): steerer.steer(a, **level)


# ---- files

def test_save_and_load(name, steerer, folder, a):
    steerer.about.update(model="some/model", layer=3)
    steerer.save_pretrained(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["card.json", "steerer.safetensors"]
    for load_it in ods.load_steerer, type(steerer).from_pretrained, ods.Steerer.from_pretrained:
        again = load_it(folder)
        assert type(again) is type(steerer) and again.card == steerer.card and again.width == D and repr(again) == repr(steerer)
        assert again.state_dict().keys() == steerer.state_dict().keys()
        for k, v in steerer.state_dict().items(): assert torch.equal(again.state_dict()[k], v) and again.state_dict()[k].dtype == v.dtype
        for how in dict(T=1.5), dict(share=.3), dict(spread=.7): assert torch.equal(again.steer(a, **how), steerer.steer(a, **how))
        assert torch.equal(again.vector_field(a.double()), steerer.vector_field(a.double()))
    steerer.about.clear()


def test_saved_twice_is_the_same_file(steerer, folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("again")
    ods.load_steerer(folder).save_pretrained(other)
    for f in folder.iterdir(): assert f.read_bytes() == (other/f.name).read_bytes()


def test_a_loaded_steerer_can_be_fitted_again(steerer, folder, data, a):
    assert torch.equal(ods.load_steerer(folder).fit(**data).steer(a, T=1.), steerer.steer(a, T=1.))


def test_the_card_says_what_it_is(name, steerer):
    card = steerer.card
    assert card["method"] == name and card["params"] == steerer.params and card["width"] == D and card["version"] == ods.__version__ and card["unit"] in ("length", "fraction")
    assert card["fit"]["n_pos"] == N_POS and card["fit"]["n_neg"] == N_NEG and re.fullmatch("[0-9a-f]{64}", card["fit"]["data_sha256"])
    assert json.loads(json.dumps(card)) == card
    for k, v in steerer.params.items(): assert v is None or hasattr(steerer, k)


DAMAGED_FILES = {  # noticed before a class is looked for
    "one bit": (lambda f: (f/"steerer.safetensors").write_bytes(bytes([(b := (f/"steerer.safetensors").read_bytes())[0] ^ 1]) + b[1:]), "does not match its card"),
    "cut tensors": (lambda f: (f/"steerer.safetensors").write_bytes((f/"steerer.safetensors").read_bytes()[:-3]), "does not match its card"),
    "cut card": (lambda f: (f/"card.json").write_text((f/"card.json").read_text()[:-5]), "card.json is not valid JSON"),
    "binary card": (lambda f: (f/"card.json").write_bytes(b"\xff\xfe\x00"), "card.json is not valid JSON"),
    "foreign card": (lambda f: (f/"card.json").write_text('{"peft_type": "LORA"}'), "not a card that this version"),
    "list for a card": (lambda f: (f/"card.json").write_text("[1]"), "not a card that this version"),
    "empty card": (lambda f: (f/"card.json").write_text(""), "card.json is not valid JSON"),
    "deep card": (lambda f: (f/"card.json").write_text('{"a":' * 100_000), "card.json is not valid JSON (nested too deep)"),
    "deep card that ends": (lambda f: (f/"card.json").write_text("[" * 100_000 + "]" * 100_000), "card.json is not valid JSON (nested too deep)"),
    "an enormous card": (lambda f: os.truncate(f/"card.json", 2**27), "card.json has 134,217,728 bytes: the file is damaged"),
    "a width that is a truth value": (lambda f: rewrite(f, lambda c: {**c, "width": True}), "not a card that this version"),
    "a card of another steerer": (lambda f: rewrite(f, lambda c: {**c, "tensors_sha256": "0" * 64}), "does not match its card"),
    "newer card": (lambda f: rewrite(f, lambda c: {**c, "format": 2}), "a newer odesteer"),
    "unknown method": (lambda f: rewrite(f, lambda c: {**c, "method": "os.system"}), "unknown method 'os.system': known are caa"),
    "method that is a list": (lambda f: rewrite(f, lambda c: {**c, "method": ["caa"]}), "not a card that this version"),
    "no safetensors": (lambda f: rewrite(f, blob=b"hello"), "is not a safetensors file"),
}
DAMAGED_METHODS = {  # noticed by the class that is filled
    "unknown setting": (lambda f: rewrite(f, lambda c: {**c, "params": {"nonsense": 1}}), "do not make a"),
    "another width": (lambda f: rewrite(f, lambda c: {**c, "width": D + 1}), f"of width {D + 1}"),
    "tensors of another width": (lambda f: rewrite(f, tensors=lambda t: {k: v.repeat_interleave(3, -1) if v.ndim else v for k, v in t.items()}), "do not make a"),
    "missing tensors": (lambda f: rewrite(f, tensors=lambda t: {"median_norm_": t["median_norm_"]}), "do not make a"),
    "foreign tensors": (lambda f: rewrite(f, tensors=lambda t: {**t, "lora.A": torch.ones(2)}), "do not make a"),
    "a tensor named like a method": (lambda f: rewrite(f, tensors=lambda t: {**t, "steer": torch.ones(2)}), "do not make a"),
    "an enormous width": (lambda f: rewrite(f, lambda c: {**c, "width": 10**12}), "no tensor is that wide"),
    "a width of nothing": (lambda f: rewrite(f, lambda c: {**c, "width": 0}), "no tensor is that wide"),
    "NaN": (lambda f: rewrite(f, tensors=lambda t: {**t, "median_norm_": torch.tensor(math.nan)}), "median_norm_ holds NaN or infinity"),
    "infinity": (lambda f: rewrite(f, tensors=lambda t: {k: torch.full_like(v, math.inf) if v.is_floating_point() else v for k, v in t.items()}), "holds NaN or infinity"),
    "integers": (lambda f: rewrite(f, tensors=lambda t: {k: v.long() if v.is_floating_point() else v for k, v in t.items()}), "instead of floats"),
    "no numbers": (lambda f: rewrite(f, tensors=lambda t: {k: v[:0] if v.ndim else v for k, v in t.items()}), "is empty"),
    "no tensors": (lambda f: rewrite(f, tensors=lambda t: {}), "no tensor is that wide"),
    "no unit of distance": (lambda f: rewrite(f, tensors=lambda t: {k: v for k, v in t.items() if k != "displacement_"}), "displacement_"),
    "many units of distance": (lambda f: rewrite(f, tensors=lambda t: {**t, "displacement_": torch.ones(D)}), "displacement_ is not one number"),
}


def check_damage(folder, harm, message):
    harm(folder)
    with pytest.raises(ValueError, match=re.escape(message)): ods.load_steerer(folder)


@common
@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_damaged_files(folder, damage): check_damage(folder, *DAMAGED_FILES[damage])


def test_a_setting_that_was_edited_is_noticed(name, folder, a, steerer):
    "A field with other settings is another field; only a card of before there was a hash of it is taken at its word"
    card = json.loads((folder/"card.json").read_text())
    for edited in (*({"params": {**card["params"], k: 3}} for k in card["params"]), {"about": {"model": "another"}}, {"chosen": {"C": 1.}}, {"fit": {}}, {"unit": "steps"}):
        (folder/"card.json").write_text(json.dumps(card | edited))
        with pytest.raises(ValueError, match="card.json is not as it was saved.*save it again"): ods.load_steerer(folder)
    (folder/"card.json").write_text(json.dumps(card, indent=3, sort_keys=True))  # laid out in another way it says the same
    assert torch.equal(ods.load_steerer(folder).steer(a, T=1.), steerer.steer(a, T=1.))
    rewrite(folder, sealed=False)
    assert "card_sha256" not in json.loads((folder/"card.json").read_text())
    old = ods.load_steerer(folder)
    assert torch.equal(old.steer(a, T=1.), steerer.steer(a, T=1.))
    old.about["note"] = "changed on purpose"
    old.save_pretrained(folder)
    assert ods.load_steerer(folder).about == old.about and "card_sha256" in json.loads((folder/"card.json").read_text())


@pytest.mark.parametrize("setting", ["steps", "epochs", "degree", "n_components", "k", "batch_size", "patience", "rank", "settings"])
@pytest.mark.parametrize("sealed", [True, False])
def test_loading_is_no_work_whatever_a_card_asks_for(name, setting, sealed, folder):
    "It is refused, or loads at once"
    if setting not in made(name).params: pytest.skip(f"{name} has no {setting}")
    absurd = {"steps": 10**12} if setting == "settings" else 10**12
    rewrite(folder, lambda c: {**c, "params": {**c["params"], setting: absurd}}, sealed=sealed)
    start = time.perf_counter()
    try: loaded = ods.load_steerer(folder)
    except ValueError as e: assert str(folder) in str(e)
    else: assert loaded.params[setting] == absurd and getattr(loaded, setting) == absurd
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("damage", DAMAGED_METHODS)
def test_files_that_do_not_make_the_method(folder, damage): check_damage(folder, *DAMAGED_METHODS[damage])


@common
def test_missing_files(folder, tmp_path):
    (folder/"steerer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no steerer.safetensors: is it a folder that save_pretrained wrote?"): ods.load_steerer(folder)
    with pytest.raises(FileNotFoundError, match="give the folder that save_pretrained wrote"): ods.load_steerer(tmp_path/"nowhere")


def test_a_file_of_another_class(name, folder):
    other = ods.ITI if name == "caa" else ods.CAA
    with pytest.raises(ValueError, match=f"holds {type(ods.make_steerer(name)).__name__}, but {other.__name__} was asked for: use odesteer.load_steerer"): other.from_pretrained(folder)


@common
def test_a_file_of_another_model_is_noticed_when_it_is_used(folder):
    with pytest.raises(ValueError, match=f"was fitted on activations of width {D}; got shape \\(2, 8\\): same model, same layer?"): ods.load_steerer(folder).steer(torch.ones(2, 8), T=1.)


# ---- what a hook asks for

@pytest.mark.parametrize("strength", [2., torch.linspace(0, 2, 7), dict(T=1.), dict(share=.3), dict(spread=.7), dict(spread=torch.linspace(0, 2, 7))], ids=str)
def test_edits(steerer, a, strength):
    value, edit = steerer.resolve(strength), steerer.edits(None, 5, strength)
    assert edit.keys() == {5} and value.dtype == torch.float32
    units = strength if isinstance(strength, dict) else {"T": strength}
    assert torch.equal(edit[5](None, a, value), steerer.steer(a, **units))
    (unit, _), = units.items()
    assert torch.equal(edit[5](None, a, 2 * value), steerer.steer(a, **{unit: 2 * value}))  # a strength changed later


def test_bad_strengths(steerer):
    with pytest.raises(ValueError, match="some of T=, spread=, share=, nats=, until=; got alpha"): steerer.edits(None, 0, dict(alpha=1.))
    with pytest.raises(ValueError, match="give one unit of strength, not T and share"): steerer.resolve(dict(T=1., share=2.))


def test_copies_and_pickles(steerer, a):
    import pickle
    for twin in copy.deepcopy(steerer), pickle.loads(pickle.dumps(steerer)): assert torch.equal(twin.steer(a, T=1.), steerer.steer(a, T=1.))


def test_can_be_moved_like_a_module(name, data, a):
    s = made(name).fit(**data)
    wide = copy.deepcopy(s).double()
    assert wide.median_norm_.dtype == torch.float64
    same_field(wide, s, a, rtol=1e-5, atol=1e-5)
