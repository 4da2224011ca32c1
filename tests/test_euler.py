"Page 00: data and its checks, the logistic regression, the constant fields, the registry"
import copy
import os
import re
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import odesteer as ods
from odesteer.euler import Contrast, Edit, Edits, alone, contrast, logistic_regression, per_row, read_json, set_aside, write_atomic


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- data

def test_contrast_keeps_float64_and_widens_the_rest():
    for dtype, kept in (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32):
        c = contrast(torch.ones(2, 3, dtype=dtype), torch.zeros(1, 3))
        assert c.pos.dtype == c.neg.dtype == c.X.dtype == c.y.dtype == kept
    assert not contrast(torch.ones(2, 3, requires_grad=True), torch.zeros(1, 3)).pos.requires_grad


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda y: 0 < sum(y) < len(y)))
def test_labels_sort_rows_and_groups_together(y):
    X = torch.arange(len(y)).float()[:, None].expand(-1, 2)
    for labels in y, np.array(y), torch.tensor(y), [float(v) for v in y]:
        c = contrast(X, labels, groups=[f"q{i}" for i in range(len(y))])
        assert c.pos[:, 0].tolist() == [i for i, v in enumerate(y) if v] and c.neg[:, 0].tolist() == [i for i, v in enumerate(y) if not v]
        assert c.groups.tolist() == [f"q{int(i)}" for i in c.X[:, 0]] and c.y.tolist() == [1.] * sum(y) + [0.] * (len(y) - sum(y))


@pytest.mark.parametrize("known, message", [
    (dict(groups=[1, 2]), "groups must hold one id per row, positives first: expected shape (5,), got (2,)"),
    (dict(pairs=[1, 2]), "pairs must be a (P, 2) integer array of rows (i, j); got shape (2,)"),
    (dict(pairs=[[0., 1.]]), "pairs must be a (P, 2) integer array"),
    (dict(pairs=np.zeros((0, 2), int)), "pairs must be a (P, 2) integer array"),
    (dict(pairs=[[0, 2]]), "pairs point outside the 3 positives and 2 negatives"),
    (dict(pairs=[[-1, 0]]), "pairs point outside"),
    (dict(source=[[float("nan")] * 4]), "source holds NaN or infinity in 1 of 1 rows"),
])
def test_contrast_says_what_is_wrong(known, message):
    with pytest.raises(ValueError, match=re.escape(message)): contrast(normal(3, 4), normal(2, 4), **known)


def test_fit_names_what_it_takes():
    import inspect
    assert {"groups", "pairs", "source", "sequences", "rewards"} <= inspect.signature(ods.CAA.fit).parameters.keys()
    with pytest.raises(TypeError, match="group"): ods.CAA().fit(normal(3, 4), normal(2, 4), group=[1, 2])


def test_row_pairs():
    c = contrast(normal(3, 4), normal(2, 4), pairs=[[2, 0], [0, 1], [1, 1]])
    p, q = c.row_pairs()
    assert torch.equal(p, c.pos[[2, 0, 1]]) and torch.equal(q, c.neg[[0, 1, 1]])
    with pytest.raises(ValueError, match=re.escape("3 positives and 2 negatives: pass pairs=")): Contrast(c.pos, c.neg).row_pairs()


# ---- strength

@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=3), st.data())
def test_per_row_repeats_a_prefix(rows, draw):
    a = torch.zeros(*rows, 5)
    k = draw.draw(st.integers(0, len(rows)))
    T = normal(*rows[:k], 1)[..., 0].float()
    out = per_row(T, a)
    assert out.shape == tuple(rows)
    for i in np.ndindex(*rows): assert out[i] == T[i[:k]]


def test_per_row_has_the_precision_of_the_maths():
    for dtype, wide in (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64):
        for T in 1, .1, torch.tensor(.1), np.float64(.1), [.1, .2]: assert per_row(T, torch.zeros(2, 3, dtype=dtype)).dtype == wide
    assert per_row(.1, torch.zeros(2, 3, dtype=torch.float64))[0].item() == .1


# ---- the probe

def probe_loss(theta, Z, y, C):
    "Loss and gradient, written down again from the definition"
    w, b = theta[:-1], theta[-1]
    m = Z @ w + b
    r = expit(m) - y
    return np.logaddexp(0, m).sum() - y @ m + w @ w / (2 * C), np.append(Z.T @ r + w / C, r.sum())


PROBES = {  # rows, entries, offset, scales
    "more rows than entries": (80, 6, 0., 1.),
    "fewer rows than entries": (20, 50, 0., 1.),
    "as many": (15, 15, 1., 1.),
    "an offset and unequal scales": (60, 10, 8., np.exp(np.linspace(-2, 2, 10))),
    "the same, few rows": (24, 40, 8., np.exp(np.linspace(-2, 2, 40))),
}


@pytest.mark.parametrize("C", [.01, 1., 100.])
@pytest.mark.parametrize("shape", PROBES)
def test_logistic_regression_reaches_the_optimum_of_scipy(shape, C):
    N, n, offset, scale = PROBES[shape]
    rng = np.random.default_rng(0)
    y = np.arange(N) % 3 > 0
    Z = offset + scale * (rng.normal(size=(N, n)) + .5 * y[:, None])
    w, b = logistic_regression(Z, y.astype(int), C)
    assert w.dtype == b.dtype == torch.float64 and w.shape == (n,) and b.shape == ()
    # a Newton method on the full problem, in all n + 1 unknowns: no span, no scikit-learn
    def hessian(t):
        A, p = np.hstack([Z, np.ones((N, 1))]), expit(Z @ t[:-1] + t[-1])
        return A.T @ (A * (p * (1 - p))[:, None]) + np.diag([1 / C] * n + [0])
    best = minimize(probe_loss, np.zeros(n + 1), (Z, y, C), jac=True, hess=lambda t, *_: hessian(t), method="trust-exact", options=dict(gtol=1e-9, maxiter=2000))
    ours, gradient = probe_loss(np.append(w, b), Z, y, C)
    assert abs(ours - best.fun) <= 1e-9 * best.fun
    np.testing.assert_allclose(np.append(w, b), best.x, rtol=1e-5, atol=1e-6 * np.abs(best.x).max())
    assert np.abs(gradient).max() < 1e-5 * N


def test_logistic_regression_on_few_rows_is_the_regression_on_all_entries():
    Z, y = normal(30, 200), np.arange(30) % 2
    w, b = logistic_regression(Z, y, 3.)
    p = torch.sigmoid(Z @ w + b)
    torch.testing.assert_close(w, 3. * (torch.as_tensor(y) - p) @ Z, rtol=1e-7, atol=1e-9)
    padded = torch.cat([Z, torch.zeros(30, 1, dtype=torch.float64)], -1)  # an entry that says nothing gets no weight
    v, _ = logistic_regression(padded, y, 3.)
    torch.testing.assert_close(v, torch.cat([w, torch.zeros(1)]), rtol=1e-7, atol=1e-9)


def test_logistic_regression_with_repeated_rows():
    Z, y = normal(10, 40), np.arange(10) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once, twice = logistic_regression(Z, y, 2.), logistic_regression(Z.repeat(2, 1), np.tile(y, 2), 1.)
    for u, v in zip(once, twice): torch.testing.assert_close(u, v, rtol=1e-6, atol=1e-8)


# ---- constant fields

@pytest.fixture(scope="module")
def pairs():
    "Paired answers with a known shift: large differences between questions, noise mostly in one entry"
    question, noise = 3 * normal(400, 6, seed=1), torch.tensor([.1, .1, .1, .1, .1, 1.5], dtype=torch.float64)
    shift = torch.tensor([1., 0, 0, 0, 0, 0], dtype=torch.float64)
    return question + 2 * shift + noise * normal(400, 6, seed=2), question + noise * normal(400, 6, seed=3), shift


def cosine(u, v): return torch.nn.functional.cosine_similarity(u, v, dim=0)


def test_caa_is_the_difference_of_means(pairs):
    pos, neg, _ = pairs
    s = ods.CAA().fit(pos, neg[:300])
    np.testing.assert_allclose(s.vector_field(pos[0]), pos.numpy().mean(0) - neg[:300].numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(s.steer(neg[:300]).numpy().mean(0), pos.numpy().mean(0), rtol=1e-9)


def test_iti_is_the_unit_probe_and_finds_the_lda_direction():
    L = np.linalg.cholesky(np.array([[2., 1.2, 0], [1.2, 1., 0], [0, 0, .5]]))
    X, y = normal(6000, 3, seed=5) @ torch.as_tensor(L).T, torch.arange(6000) % 2
    X = X + y[:, None] * torch.tensor([1., .2, .4])
    s = ods.ITI().fit(X, y)
    v = s.vector_field(X[0])
    assert abs(v.norm() - 1) < 1e-12
    w, b = logistic_regression(X, y)
    torch.testing.assert_close(v, w / w.norm(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(s.intercept_, b, rtol=1e-6, atol=1e-8)
    assert cosine(v, torch.as_tensor(LinearDiscriminantAnalysis().fit(X, y).coef_[0])) > .999


def test_fitted_offsets():
    pos, neg = normal(30, 4) + 1, normal(10, 4, seed=1)
    assert abs(ods.ITI().fit(pos, neg).log_prior_.item() - np.log(10 / 30)) < 1e-12
    torch.testing.assert_close(ods.RepE().fit(pos[:10], neg).mid_, (pos[:10].mean(0) + neg.mean(0)) / 2)


@pytest.mark.parametrize("C", [0, -1., float("inf"), float("nan"), "1", None, True])
def test_iti_refuses_a_penalty_that_is_none(C):
    with pytest.raises(ValueError, match="C must be a positive number; got"): ods.ITI(C=C)


def test_repe_is_the_pca_of_both_orders_of_every_pair(pairs):
    pos, neg, shift = pairs
    s = ods.RepE().fit(pos, neg)
    delta = (pos - neg).numpy()
    flipped = np.concatenate([delta, -delta])
    expected = torch.as_tensor(PCA(1).fit(flipped).components_[0])  # centring is harmless: the mean is zero
    assert abs(cosine(s.direction_, expected).abs() - 1) < 1e-10 and abs(s.direction_.norm() - 1) < 1e-12


def test_repe_needs_no_centring_and_the_table_variant_shows_why():
    noise = torch.tensor([.1, .1, 1.5], dtype=torch.float64)
    shift = torch.tensor([5., 0, 0], dtype=torch.float64)
    question = normal(500, 3, seed=6)
    pos, neg = question + shift + noise * normal(500, 3, seed=7), question + noise * normal(500, 3, seed=8)
    assert cosine(ods.RepE().fit(pos, neg).direction_, shift) > .99
    table = ods.RepE(variant="paper-table").fit(pos, neg[:400])  # row i with row i, up to the shorter table
    assert cosine(table.direction_, shift).abs() < .1
    expected = torch.as_tensor(PCA(1).fit((pos[:400] - neg[:400]).numpy()).components_[0])
    assert abs(cosine(table.direction_, expected).abs() - 1) < 1e-10


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (8, 3), elements=st.floats(-5, 5, width=32)), st.sampled_from(["repe", "paper-table"]))
def test_repe_points_towards_the_wanted_mean(noise, variant):
    pos, neg = normal(8, 3) + torch.as_tensor(noise), normal(8, 3, seed=9)
    there, back = ods.RepE(variant).fit(pos, neg).direction_, ods.RepE(variant).fit(neg, pos).direction_
    assert there @ (pos.mean(0) - neg.mean(0)) > -1e-6 and back @ (neg.mean(0) - pos.mean(0)) > -1e-6


def test_repe_takes_the_pairs_given(pairs):
    pos, neg, _ = pairs
    shuffle = torch.randperm(len(neg), generator=torch.Generator().manual_seed(0))
    back = torch.argsort(shuffle)
    given_pairs = ods.RepE().fit(pos, neg[shuffle], pairs=torch.stack([torch.arange(len(pos)), back], 1).numpy())
    torch.testing.assert_close(given_pairs.direction_, ods.RepE().fit(pos, neg).direction_)
    with pytest.raises(ValueError, match=re.escape("400 positives and 300 negatives: pass pairs=")): ods.RepE().fit(pos, neg[:300])


def test_repe_refuses_an_unknown_variant():
    with pytest.raises(ValueError, match="variant must be 'repe' or 'paper-table'; got 'pca'"): ods.RepE(variant="pca")


@pytest.mark.parametrize("method, shift, message", [
    (ods.CAA, 0., "have the same mean"), (ods.ITI, 0., "have the same mean"), (ods.RepE, 0., "differences hold no direction: they are all zero"),
    (lambda: ods.RepE("paper-table"), 1., "they are all zero once centred"),
], ids=["caa", "iti", "repe", "paper-table"])
def test_no_difference_no_steerer(method, shift, message):
    X = torch.ones(7, 4) / 3
    with pytest.raises(ValueError, match=message): method().fit(X + shift, X)


def test_constant_fields_need_one_step_only(pairs):
    pos, neg, _ = pairs
    for s in ods.CAA(), ods.ITI(), ods.RepE():
        s.fit(pos, neg)
        torch.testing.assert_close(s.steer(s.steer(neg, T=.7), T=1.3), s.steer(neg, T=2.))


def test_equal_means_up_to_rounding_are_equal():
    X = 1e3 + normal(50, 8).float()
    for method in ods.CAA, ods.ITI:
        with pytest.raises(ValueError, match="have the same mean"): method().fit(torch.cat([X, X, X]), X.flip(0))
    method().fit(X + .01, X)


# ---- a method of one's own, and the registry

class Shrink(ods.Steerer):
    "A field that is not constant, from three lines"
    def _fit(self, data): pass
    def _field(self, x): return -x


def test_own_methods_need_a_fit_and_a_field_only(tmp_path):
    s = Shrink().fit(normal(4, 3), normal(5, 3))
    x = normal(2, 3, seed=4)
    torch.testing.assert_close(s.steer(x, T=.25), .75 * x)
    with pytest.raises(ValueError, match="Shrink is not in odesteer's registry, so it could not be loaded again"): s.save_pretrained(tmp_path/"mine")
    assert not (tmp_path/"mine").exists()


def test_registry():
    assert {"caa", "iti", "repe"} <= set(ods.steerer_names()) <= set(ods.steerer_names(kind=None))
    assert type(ods.make_steerer("iti", C=2.)) is ods.ITI and ods.make_steerer("iti", C=2.).params == {"C": 2.}
    with pytest.raises(ValueError, match="unknown method 'cca': known are caa, iti"): ods.make_steerer("cca")
    with pytest.raises(TypeError, match="gamma"): ods.make_steerer("iti", gamma=2.)


def test_printing():
    assert repr(ods.ITI()) == "ITI(), not fitted" and repr(ods.ITI(C=2.)) == "ITI(C=2.0), not fitted"


def test_a_hyper_parameter_that_is_set_later_counts_everywhere(tmp_path):
    "In every precision, on the card and in the file; a shallow copy with another one leaves the original alone"
    pos, neg, x = normal(30, 6) + 1, normal(30, 6, seed=1), normal(4, 6, seed=2)
    def fresh(**kw): return ods.ODESteer(n_components=32, **kw).fit(pos.float(), neg.float())
    s, want = fresh(), fresh(steps=3)
    before = s.steer(x, T=1.), s.steer(x.float(), T=1.)  # the first by a copy in float64
    s.steps = 3
    assert torch.equal(s.steer(x, T=1.), want.steer(x, T=1.)) and torch.equal(s.steer(x.float(), T=1.), want.steer(x.float(), T=1.))
    assert s.card["params"] == want.card["params"] and "steps=3" in repr(s)
    s.save_pretrained(tmp_path/"s")
    assert torch.equal(ods.Steerer.from_pretrained(tmp_path/"s").steer(x, T=1.), s.steer(x, T=1.))
    twin = copy.copy(s)
    twin.steps = 10
    assert s.steps == s.card["params"]["steps"] == 3 and torch.equal(twin.steer(x, T=1.), before[0]) and torch.equal(s.steer(x, T=1.), want.steer(x, T=1.))


def test_a_card_that_json_cannot_carry(tmp_path):
    s = ods.CAA().fit(normal(3, 2), normal(3, 2, seed=1))
    s.about["dtype"] = torch.float32
    with pytest.raises(ValueError, match="JSON cannot carry.*in .about can be saved"): s.save_pretrained(tmp_path/"caa")
    assert not (tmp_path/"caa").exists()


def test_saving_leaves_no_other_files_and_is_readable_by_all(tmp_path):
    s = ods.CAA().fit(normal(3, 2), normal(3, 2, seed=1))
    for _ in range(2): s.save_pretrained(tmp_path/"a"/"b")
    assert sorted(os.listdir(tmp_path/"a"/"b")) == ["card.json", "steerer.safetensors"]
    if os.name == "posix": assert all(f.stat().st_mode & 0o044 == 0o044 for f in (tmp_path/"a"/"b").iterdir())


@pytest.mark.parametrize("data, written", [(b"a\x00b", b"a\x00b"), ("\u00e9\n", "\u00e9\n".encode()), (["a\n", "\u00e9\n"], "a\n\u00e9\n".encode()), (iter([]), b"")], ids=["bytes", "str", "lines", "none"])
def test_a_file_is_written_whole(tmp_path, data, written):
    write_atomic(tmp_path/"f", b"old and longer")
    write_atomic(str(tmp_path/"f"), data)
    assert (tmp_path/"f").read_bytes() == written and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, old, error):
    def lines():
        yield "half\n"
        raise error("stopped")
    if old: write_atomic(tmp_path/"f", old)
    with pytest.raises(error, match="stopped"): write_atomic(tmp_path/"f", lines())
    assert os.listdir(tmp_path) == ["f"] * (old is not None) and (old is None or (tmp_path/"f").read_bytes() == old)
    with pytest.raises(AttributeError): write_atomic(tmp_path/"f", [1])
    assert os.listdir(tmp_path) == ["f"] * (old is not None)


@pytest.mark.skipif(os.name != "posix", reason="folders can be synced where they can be opened")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    "A power cut leaves the old file or the new one: the new one is flushed, then renamed, then the folder is flushed"
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("sync", os.path.realpath(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("rename", os.path.realpath(a))) or replace(a, b))
    write_atomic(tmp_path/"f", b"new")
    (_, part), renamed, folder = done
    assert renamed == ("rename", part) and (folder == ("sync", str(tmp_path)) if sys.platform == "linux" else True)
    done.clear()
    ods.CAA().fit(normal(3, 2), normal(3, 2, seed=1)).save_pretrained(tmp_path)
    assert [what for what, _ in done] == ["sync", "rename", "sync"] * 2


def turn(lock, pace, order, name, work="the same"):
    with alone(lock, work) as waited:
        order.append(name)
        time.sleep(pace)
        order.append(name)
    return waited


def test_what_must_not_interleave_takes_turns(tmp_path):
    order = []
    with ThreadPoolExecutor(8) as pool: waited = list(pool.map(lambda i: turn(tmp_path/"lock", .02, order, i), range(8)))
    assert len(order) == 16 and order[::2] == order[1::2] and sum(waited) >= 3 and os.listdir(tmp_path) == []


def test_a_lock_file_that_goes_at_the_worst_moment(tmp_path, monkeypatch):
    "Who had it removes it after it was locked and before it was looked at: another is made, and the old one is let go"
    stat, gone = os.stat, []
    def late(path, **kw):
        if not gone: gone.append(os.unlink(path))
        return stat(path, **kw)
    monkeypatch.setattr(os, "stat", late)
    with alone(tmp_path/"lock") as waited: assert gone and not waited and os.listdir(tmp_path) == ["lock"]
    assert os.listdir(tmp_path) == []


def test_processes_take_turns_and_one_that_dies_lets_go(tmp_path):
    code = "import sys, time; from odesteer.euler import alone\nwith alone(sys.argv[1], 'the same'):\n print('mine', flush=True)\n time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="another process is at work here, with other settings .it holds .*lock.: wait until it is done, or write elsewhere"), alone(tmp_path/"lock", "other"): pass
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(turn, tmp_path/"lock", 0, order := [], "second")
            time.sleep(.2)
            assert not other.done() and order == []
            p.kill()
            assert other.result(timeout=30) is True
    finally:
        p.kill()
        p.wait()
    with alone(tmp_path/"lock", "other") as waited: assert not waited


def test_a_lock_is_gone_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), alone(tmp_path/"lock"): raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, why", [(b"", "Expecting value"), (b'{"a": 1', "Expecting"), (b"\xff\xfe\x00", "codec"), (b"[" * 100_000, "nested too deep"), (b"\x00" * 64, "Expecting value")])
def test_a_damaged_json_file_is_named(tmp_path, text, why):
    (tmp_path/"f.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"f.json is not valid JSON .*{why}.*: the file is damaged") as e: read_json(tmp_path/"f.json")
    assert str(tmp_path/"f.json") in str(e.value)
    with pytest.raises(FileNotFoundError): read_json(tmp_path/"none.json")


def test_what_is_damaged_is_kept_under_another_name(tmp_path, capsys):
    for content in "first", "second":  # of two accidents the last is kept
        (tmp_path/"f").write_text(content)
        assert set_aside(tmp_path/"f") == tmp_path/"f.damaged" and (tmp_path/"f.damaged").read_text() == content
        (tmp_path/"d").mkdir()
        (tmp_path/"d"/"f").write_text(content)
        assert (set_aside(tmp_path/"d")/"f").read_text() == content
    assert sorted(os.listdir(tmp_path)) == ["d.damaged", "f.damaged"]
    assert f"odesteer: {tmp_path/'f'} is damaged; it is kept as f.damaged, and made again" in capsys.readouterr().err


# ---- what a hook and a sweep ask

def test_an_edit_calls_what_it_was_given():
    x = normal(2, 3)
    plain, recalling = Edit(lambda a, b, value: b + value), Edit(lambda a, b, value, kept: b + value * kept, remember=lambda q: 2 * q)
    assert plain.remember is None and torch.equal(plain(None, x, 1.), x + 1.)
    assert torch.equal(recalling(None, x, 3., recalling.remember(x)), 7 * x)


def test_a_method_answers_what_hooks_and_sweeps_ask():
    for name in "caa", "iti", "repe":
        s = ods.make_steerer(name).fit(normal(4, 3), normal(4, 3, seed=1))
        assert isinstance(s, Edits) and s.needs_layer and s.strength_units == ("T", "share", "spread")
        assert s.default_strength == ({"T": 1.} if name == "caa" else {"spread": .5})
        assert s.strengths == tuple({"spread": x} for x in (.25, .4, .6, .85, 1.2, 1.7, 2.4)) and set(s.strength_units) < s.strength_names.keys()
        (layer, edit), = s.edits(None, 3, s.default_strength).items()
        assert layer == 3 and isinstance(edit, Edit) and edit.remember is None
        x = normal(2, 3, seed=2)
        torch.testing.assert_close(edit(None, x, s.resolve(s.default_strength)), s.steer(x, **s.default_strength))
    assert ods.ODESteer().strength_units == ("T", "share", "spread", "nats", "until")
    assert not isinstance(object(), Edits)


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path):
    import huggingface_hub
    def refuse(*args, **kw): raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=re.escape("no folder owner/name here, and the hub could not give it as a repository (ConnectionError)")): ods.load_steerer("owner/name")
    saved = ods.CAA().fit(normal(3, 2), normal(3, 2, seed=1))
    saved.save_pretrained(tmp_path)
    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: seen.update(repo=repo, **kw) or str(tmp_path))
    assert torch.equal(ods.load_steerer("owner/name", revision="v1").mean_pos_, saved.mean_pos_)
    assert seen["repo"] == "owner/name" and seen["revision"] == "v1" and set(seen["allow_patterns"]) == {"card.json", "steerer.safetensors"}


def test_steering_with_a_saved_constant_field_loads_no_heavy_library(tmp_path):
    ods.CAA().fit(normal(3, 2), normal(3, 2, seed=1)).save_pretrained(tmp_path)
    heavy = ("sklearn", "scipy", "matplotlib", "transformers", "datasets", "torchdiffeq", "ipywidgets")
    code = f"import sys, torch, odesteer as ods; ods.load_steerer({str(tmp_path)!r}).steer(torch.ones(2)); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_shapes_without_numbers_can_be_steered():
    s = ods.CAA().fit(normal(3, 4) + 1, normal(2, 4))
    assert s.steer(torch.empty(2, 4, device="meta"), T=1.).shape == (2, 4)
