"Optimal-transport steerers against closed forms, SciPy and brute force; placebos against what they promise"
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

import odesteer as ods
from odesteer.baselines import LinAcT, MiMiC, RandomDirection, ShuffledLabels, gaussian_map, shuffle_labels, sorted_map, square_root
from odesteer.euler import contrast

D = 6
quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, d=D):
    X = normal(d, d, seed=seed)
    return X @ X.T + .1 * torch.eye(d)


def exact_cloud(n, mean, cov, seed):
    "A sample whose mean and covariance (over n) are exactly these"
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    return mean + x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T @ torch.linalg.cholesky(cov).T


def moments(x):
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / len(x)


@pytest.fixture(scope="module")
def gaussians():
    mean = 40 * torch.ones(D).double()  # far apart, so that the probe calls every unwanted row unwanted
    return dict(pos=exact_cloud(300, mean, covariance(1), 2), neg=exact_cloud(200, -mean, covariance(3), 4), cov_pos=covariance(1), cov_neg=covariance(3))


# ---------------------------------------------------------------- MiMiC

@quick
@given(seeds, st.integers(1, 8))
def test_the_matrix_is_scipys_and_symmetric(seed, d):
    Sigma, target = covariance(seed, d), covariance(seed + 1, d)
    root, inverse = (np.real(sqrtm(x)) for x in (Sigma.numpy(), np.linalg.inv(Sigma.numpy())))
    expected = inverse @ np.real(sqrtm(root @ target.numpy() @ root)) @ inverse
    M = gaussian_map(Sigma, target)
    np.testing.assert_allclose(M, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(M, M.T)
    torch.testing.assert_close(M @ Sigma @ M, target, rtol=1e-7, atol=1e-8)


def test_the_root_of_a_singular_matrix():
    x = normal(D, 3, seed=5)
    root = square_root(x @ x.T)
    np.testing.assert_allclose(root @ root, x @ x.T, rtol=1e-9, atol=1e-9)
    assert (torch.linalg.eigvalsh(root) > -1e-9).all()


def test_mimic_carries_one_gaussian_onto_the_other(gaussians):
    pos, neg = gaussians["pos"], gaussians["neg"]
    s = MiMiC(ridge=0.).fit(pos, neg)
    for T, mean, cov in (1., pos.mean(0), gaussians["cov_pos"]), (0., neg.mean(0), gaussians["cov_neg"]):
        torch.testing.assert_close(moments(s.steer(neg, T=T)), (mean, cov), rtol=1e-7, atol=1e-7)
    fresh = exact_cloud(1000, neg.mean(0), gaussians["cov_neg"], 9)  # rows that it has not seen
    torch.testing.assert_close(moments(s.steer(fresh, T=1.)), (pos.mean(0), gaussians["cov_pos"]), rtol=1e-7, atol=1e-7)


def test_mimic_with_its_ridge_is_the_published_formula(gaussians):
    pos, neg = gaussians["pos"], gaussians["neg"]
    Sigma_pos, Sigma_neg = (np.cov(x.numpy().T, bias=True) + .01 * np.eye(D) for x in (pos, neg))
    inverse, root = np.linalg.inv(np.real(sqrtm(Sigma_neg))), np.real(sqrtm(Sigma_neg))
    M = inverse @ np.real(sqrtm(root @ Sigma_pos @ root)) @ inverse
    expected = (neg.numpy() - neg.numpy().mean(0)) @ M + pos.numpy().mean(0)
    np.testing.assert_allclose(MiMiC().fit(pos, neg).steer(neg), expected, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(MiMiC().fit(pos, neg).steer(neg, T=.25), .75 * neg.numpy() + .25 * expected, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(MiMiC().fit(pos.float(), neg.float()).steer(neg.float()), expected, rtol=1e-4, atol=1e-3)


def test_mimic_moves_the_rows_that_scikit_learns_probe_calls_unwanted():
    from sklearn.linear_model import LogisticRegression
    pos, neg, new = normal(70, D, seed=1) + .6, normal(50, D, seed=2), normal(500, D, seed=3) + .3
    probe = LogisticRegression(tol=1e-12, max_iter=10_000).fit(torch.cat([pos, neg]).numpy(), np.repeat([1, 0], [70, 50]))
    new = new[abs(probe.decision_function(new.numpy())) > 1e-6]  # rows on the boundary are anybody's
    unwanted = torch.as_tensor(probe.predict(new.numpy()) == 0)
    s = MiMiC().fit(pos, neg)
    changed = (s.steer(new, T=1.) != new).any(-1)
    assert torch.equal(changed, unwanted) and 100 < changed.sum() < 400
    assert torch.equal((s.vector_field(new) != 0).any(-1), unwanted)
    for T in -1., .3, 2.: assert torch.equal(s.steer(new, T=T)[~unwanted], new[~unwanted])
    stays = torch.as_tensor(probe.predict(neg.numpy()) == 1)
    assert 0 < stays.sum() < 25 and s.displacement_.item() == pytest.approx((s.steer(neg, T=1.) - neg).norm(dim=-1)[~stays].median().item(), rel=1e-9)


def test_mimic_with_fewer_rows_than_coordinates_needs_its_ridge():
    pos, neg = normal(5, 40, seed=1) + 3, normal(4, 40, seed=2)
    assert torch.isfinite(MiMiC().fit(pos, neg).steer(neg)).all()
    with pytest.raises(ValueError, match="the covariance of the 5 wanted activations of width 40 has no inverse with ridge=0.0: use a larger ridge="): MiMiC(ridge=0.).fit(pos, neg)
    torch.testing.assert_close(MiMiC().fit(pos[:1], neg[:1]).steer(neg[:1]), pos[:1])  # no spread: a shift
    same = normal(20, D)
    with pytest.raises(ValueError, match="wanted and unwanted activations have the same mean"): MiMiC().fit(same, same.clone())


@pytest.mark.parametrize("params, message", [(dict(ridge=-1.), "ridge must be a non-negative number; got -1.0"), (dict(C=0), "C must be a positive number; got 0"), (dict(ridge="1"), "ridge must be"),
                                             (dict(C=True), "C must be"), (dict(ridge=float("nan")), "ridge must be")])
def test_mimic_refuses(params, message):
    with pytest.raises(ValueError, match=message): MiMiC(**params)


# ---------------------------------------------------------------- Linear-AcT

@quick
@given(seeds)
def test_linact_recovers_diagonal_affine_maps(seed):
    neg, scale, shift = normal(50, D, seed=seed), normal(D, seed=seed + 1).abs() + .1, 5 * normal(D, seed=seed + 2)
    pos = (scale * neg + shift)[torch.randperm(50, generator=torch.Generator().manual_seed(seed))]  # rows do not correspond
    new = normal(30, D, seed=seed + 3)
    for variant in "linear", "gaussian":
        torch.testing.assert_close(LinAcT(variant=variant).fit(pos, neg).steer(new), scale * new + shift, rtol=1e-7, atol=1e-7)


def test_linact_is_what_a_loop_over_sorted_values_gives():
    pos, neg, new = normal(40, D, seed=1)**3 + 1, normal(40, D, seed=2), normal(9, D, seed=3)
    expected = new.clone().numpy()
    for j in range(D):
        s, g = sorted(neg[:, j].tolist()), sorted(pos[:, j].tolist())
        s_mean, g_mean = sum(s) / 40, sum(g) / 40
        w = sum((x - s_mean) * (y - g_mean) for x, y in zip(s, g)) / (sum((x - s_mean)**2 for x in s) + 1e-10)
        expected[:, j] = w * expected[:, j] + g_mean - w * s_mean
    s = LinAcT().fit(pos, neg)
    np.testing.assert_allclose(s.steer(new), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(LinAcT(strength=.3).fit(pos, neg).steer(new), .7 * new.numpy() + .3 * expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(LinAcT(strength=.3).fit(pos, neg).steer(new), s.steer(new, T=.3))


def test_sorting_is_the_best_of_all_pairings():
    from itertools import permutations
    s, g = normal(6, 1, seed=1), normal(6, 1, seed=2)
    slopes = [np.polyfit(s[:, 0], g[list(p), 0], 1)[0] for p in permutations(range(6))]
    costs = [((s - g[list(p)])**2).sum().item() for p in permutations(range(6))]
    assert sorted_map(s, g).item() == pytest.approx(slopes[int(np.argmin(costs))], abs=1e-8)


def test_mean_act_is_caa_and_the_map_of_means_has_equal_counts_or_not():
    pos, neg, new = normal(33, D, seed=1) + 1, normal(50, D, seed=2), normal(9, D, seed=3)
    torch.testing.assert_close(LinAcT(variant="mean").fit(pos, neg).steer(new, T=.7), ods.CAA().fit(pos, neg).steer(new, T=.7))


def test_gaussian_act_matches_means_and_deviations_of_coordinates_that_vary():
    pos, neg = normal(60, D, seed=1) @ covariance(2) + 1, normal(50, D, seed=3)
    steered = LinAcT(variant="gaussian").fit(pos, neg).steer(neg)
    torch.testing.assert_close(steered.mean(0), pos.mean(0))
    torch.testing.assert_close(steered.std(0, correction=0), pos.std(0, correction=0))
    neg[:, 0], pos[:, 1] = 1e-5 * neg[:, 0], 3.
    steered = LinAcT(variant="gaussian").fit(pos, neg).steer(neg)
    assert torch.equal(steered[:, :2], neg[:, :2]) and (steered[:, 2:] != neg[:, 2:]).all()


def test_a_constant_coordinate_goes_to_the_mean_of_its_target():
    pos, neg = normal(20, D, seed=1), normal(20, D, seed=2)
    neg[:, 0] = 2.
    torch.testing.assert_close(LinAcT().fit(pos, neg).steer(neg)[:, 0], pos[:, 0].mean().expand(20))


@pytest.mark.parametrize("n_pos, n_neg", [(30, 50), (50, 30)])
def test_unequal_counts_are_shuffled_by_the_seed_and_cut(n_pos, n_neg):
    pos, neg = normal(n_pos, D, seed=1).sort(0).values + 1, normal(n_neg, D, seed=2).sort(0).values  # sorted: taking the first rows would be wrong
    fits = [LinAcT(seed=seed).fit(pos, neg) for seed in (0, 0, 1)]
    assert torch.equal(fits[0].steer(neg), fits[1].steer(neg)) and not torch.equal(fits[0].steer(neg), fits[2].steer(neg))
    whole = LinAcT(variant="gaussian").fit(pos, neg)  # uses every row: what the cut tables estimate
    assert (LinAcT().fit(pos, neg).steer(neg) - whole.steer(neg)).abs().mean() < .5 * (whole.steer(neg) - neg).abs().mean()


def test_equal_counts_need_no_seed():
    pos, neg = normal(30, D, seed=1), normal(30, D, seed=2)
    assert torch.equal(LinAcT(seed=0).fit(pos, neg).steer(neg), LinAcT(seed=5).fit(pos, neg).steer(neg))


@pytest.mark.parametrize("support", ["q_0_100", "q_10_90", "q_2.5_97.5"])
def test_support_moves_only_coordinates_between_percentiles_of_the_source(support):
    pos, neg, new = normal(200, D, seed=1) + 1, normal(150, D, seed=2), 3 * normal(100, D, seed=3)
    low, high = np.percentile(neg.numpy(), [float(q) for q in support.split("_")[1:]], axis=0)
    inside = torch.as_tensor((new.numpy() >= low) & (new.numpy() <= high))
    plain, masked = LinAcT().fit(pos, neg).steer(new), LinAcT(support=support).fit(pos, neg).steer(new)
    assert 100 < inside.sum() < 500
    torch.testing.assert_close(masked, torch.where(inside, plain, new))
    assert torch.equal(masked[~inside], new[~inside])


@pytest.mark.parametrize("params, message", [
    (dict(variant="cubic"), "variant must be 'linear', 'mean' or 'gaussian'; got 'cubic'"), (dict(strength=0), r"strength must lie in \(0, 1\]; got 0"), (dict(strength=1.5), "got 1.5: T goes further"),
    (dict(strength=True), "strength must lie"), *((dict(support=s), "support must be None or 'q_LOW_HIGH'.*q_0_100") for s in ("q_0", "q_50_50", "q_60_40", "q_0_101", "0_100", "", 3)),
])
def test_linact_refuses(params, message):
    with pytest.raises(ValueError, match=message): LinAcT(**params)


def test_many_rows_of_many_coordinates_have_quantiles_too():
    neg = torch.randn(4200, 4096, generator=torch.Generator().manual_seed(0))  # more than the 2**24 numbers that torch.quantile takes
    s = LinAcT(variant="mean", support="q_10_90").fit(neg[:10] + 1, neg)
    np.testing.assert_allclose(s.low_[:5], np.percentile(neg[:, :5].double().numpy(), 10, axis=0), rtol=1e-5)


# ---------------------------------------------------------------- placebos

def test_a_random_direction_has_the_length_of_the_mean_difference_and_no_preference():
    pos, neg = normal(30, D, seed=1) + 1, normal(40, D, seed=2)
    delta = pos.mean(0) - neg.mean(0)
    v = torch.stack([RandomDirection(seed=s).fit(pos, neg).vector_field(neg[0]) for s in range(400)])
    torch.testing.assert_close(v.norm(dim=-1), delta.norm().expand(400))
    cos = v @ delta / delta.norm()**2
    assert abs(cos.mean()) < 4 / (D * 400)**.5 and cos.var().item() == pytest.approx(1 / D, rel=.25)  # uniform on the sphere: variance 1/d


def table(n_pos, n_neg, **kw):
    "Rows that carry their own number, so that a shuffle can be followed"
    rows = torch.arange(1., n_pos + n_neg + 1)[:, None].double()
    return contrast(rows[:n_pos], rows[n_pos:], **kw)


def numbers(x): return x.flatten().long().tolist()


@quick
@given(seeds, st.integers(2, 30), st.integers(2, 30), st.booleans())
def test_a_shuffle_keeps_every_row_and_both_counts(seed, n_pos, n_neg, balanced):
    d = shuffle_labels(table(n_pos, n_neg), seed, balanced)
    assert (len(d.pos), len(d.neg)) == (n_pos, n_neg) and sorted(numbers(d.X)) == list(range(1, n_pos + n_neg + 1))
    again, other = shuffle_labels(table(n_pos, n_neg), seed, balanced), shuffle_labels(table(n_pos, n_neg), seed + 1, balanced)
    assert torch.equal(d.X, again.X) and (n_pos < 20 or not torch.equal(d.X, other.X))


def test_a_shuffle_without_structure_mixes_all_rows():
    share = np.mean([[i <= 30 for i in numbers(shuffle_labels(table(30, 20), s).pos)] for s in range(200)])
    assert share == pytest.approx(30 / 50, abs=.02)  # a wanted label falls on each row equally often


@quick
@given(seeds, st.booleans())
def test_a_shuffle_exchanges_labels_within_questions(seed, balanced):
    rng = np.random.default_rng(seed)
    pos_groups, neg_groups = rng.integers(0, 6, 25), rng.integers(0, 8, 30)  # 6 and 7 have unwanted answers only
    d = table(25, 30, groups=np.concatenate([pos_groups, neg_groups]))
    new, of = shuffle_labels(d, seed, balanced), dict(zip(numbers(d.X), d.groups))
    assert [of[i] for i in numbers(new.X)] == new.groups.tolist()  # the ids went with their rows
    for g in set(pos_groups) & set(neg_groups): assert (new.groups[:25] == g).sum() == (pos_groups == g).sum()  # the others trade with one another


@quick
@given(seeds, st.booleans())
def test_a_shuffle_swaps_pairs_and_keeps_them(seed, balanced):
    rng = np.random.default_rng(seed)
    pairs = np.stack([rng.permutation(20), rng.permutation(30)[:20]], 1)
    d = table(20, 30, pairs=pairs, source=torch.arange(20.)[:, None])
    new = shuffle_labels(d, seed, balanced)
    before = {frozenset(p) for p in zip(numbers(d.pos[pairs[:, 0]]), numbers(d.neg[pairs[:, 1]]))}
    p, q = new.row_pairs()
    assert {frozenset(x) for x in zip(numbers(p), numbers(q))} == before and len(new.pairs) == 20
    place = {frozenset(x): k for k, x in enumerate(zip(numbers(d.pos[pairs[:, 0]]), numbers(d.neg[pairs[:, 1]])))}
    assert [place[frozenset(x)] for x in zip(numbers(p), numbers(q))] == numbers(new.source)  # and each its own source
    swapped = sum(i > 20 for i in numbers(p))
    assert swapped == 10 if balanced else 2 <= swapped <= 18


@quick
@given(seeds, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_a_balanced_shuffle_owes_each_question_less_than_a_row(seed, sizes):
    "Wanted rows that stay wanted: what chance leaves on average, up to rounding, in each question and in all of them"
    pos, neg = (np.repeat(np.arange(len(sizes)), [s[k] for s in sizes]) for k in (0, 1))
    if min(len(pos), len(neg)) == 0 or np.array_equal(pos, neg): return  # empty, or pairs
    d = table(len(pos), len(neg), groups=np.concatenate([pos, neg]))
    stay = np.array([i for i in numbers(shuffle_labels(d, seed, balanced=True).pos) if i <= len(pos)], int)
    for g, (a, b) in enumerate(sizes):
        if a and b: assert abs((pos[stay - 1] == g).sum() - a*a / (a + b)) <= 1


@quick
@given(seeds, st.integers(4, 40))
def test_a_difference_that_all_pairs_share_cancels_where_labels_are_balanced(seed, n):
    noise = normal(2*n, D, seed=seed)
    def rest(balanced):
        d = shuffle_labels(contrast(noise[:n] + 100, noise[n:], pairs=[[i, i] for i in range(n)]), seed, balanced)
        return d.mean_difference().abs().mean().item()
    assert rest(True) < (100/n if n % 2 else 0) + 4  # of 100, an odd pair leaves one part in n


def test_rows_of_equal_number_are_pairs_unless_their_questions_differ():
    p, q = shuffle_labels(table(20, 20), 0).row_pairs()
    assert all(abs(i - j) == 20 for i, j in zip(numbers(p), numbers(q)))
    assert shuffle_labels(table(20, 20, groups=[*range(20), *range(20, 40)]), 0).pairs is None


def test_rewards_follow_the_labels_where_each_row_has_its_response():
    d = table(20, 20, sequences=[torch.full((2, 1), float(i + 1)) for i in range(40)], rewards=torch.arange(1., 41.))
    new = shuffle_labels(d, 3)
    assert [int(s[0]) for s in new.sequences] == numbers(new.X)  # each row keeps its response
    assert (new.rewards[:20] <= 20).all() and (new.rewards[20:] > 20).all()  # and takes the reward of a row that had its new label
    assert all(r in (i, i + 20, i - 20) for i, r in zip(numbers(new.X), new.rewards.tolist())) and sorted(new.rewards.tolist()) == list(range(1, 41))


def test_rewards_of_other_responses_are_shuffled_among_these():
    d = table(20, 20, sequences=[torch.ones(2, 1)] * 30, rewards=torch.arange(30.))
    new = shuffle_labels(d, 3)
    assert new.sequences is d.sequences and sorted(new.rewards.tolist()) == list(range(30)) and not torch.equal(new.rewards, d.rewards)


@pytest.mark.filterwarnings("ignore:nats= and until=")
@pytest.mark.parametrize("method, settings_", [("caa", None), ("iti", dict(C=.5)), ("repe", {}), ("mimic", None), ("hpr", dict(epochs=2)), ("recontrol", dict(epochs=2, steps=3)), ("truthflow", dict(epochs=2, steps=2)), ("linact", dict(support="q_0_100")), ("odesteer", dict(n_components=64, C="cv")), ("step-odesteer", dict(n_components=64, features="rff"))])
def test_shuffled_labels_is_the_method_itself_on_shuffled_data_and_loads_again(method, settings_, tmp_path):
    pos, neg, new = normal(60, D, seed=1).float() + 3, normal(60, D, seed=2).float() - 3, normal(9, D, seed=3).float()
    s = ShuffledLabels(method, seed=4, settings=settings_).fit(pos, neg)
    d = shuffle_labels(contrast(pos, neg), 4)
    plain = ods.make_steerer(method, **(settings_ or {})).fit(d.pos, d.neg, pairs=d.pairs)
    assert s.unit == plain.unit and torch.equal(s.steer(new, T=2.), plain.steer(new, T=2.)) and torch.equal(s.vector_field(new), plain.vector_field(new)) and s.displacement_ == plain.displacement_
    s.save_pretrained(tmp_path)
    again = ods.load_steerer(tmp_path)
    assert json.loads((tmp_path/"card.json").read_text())["params"] == dict(method=method, seed=4, settings=settings_, balanced=False)
    for how in dict(T=2.), dict(share=.2): assert torch.equal(again.steer(new, **how), s.steer(new, **how))
    if hasattr(plain, "stop_at"): assert torch.equal(again.steer(new, nats=-.01), plain.steer(new, nats=-.01))


def test_what_shuffling_leaves_is_what_chance_gives():
    "The mean difference of shuffled labels has the mean and the variance that a permutation gives it"
    pos, neg = normal(40, D, seed=1) + 2, normal(40, D, seed=2)
    delta = pos.mean(0) - neg.mean(0)
    null = torch.stack([ShuffledLabels(seed=s).fit(pos, neg).vector_field(neg[0]) for s in range(300)])
    swap = ((pos - neg)**2).sum(0) / 40**2  # each pair adds +-(p - q) / 40
    assert (null.mean(0).abs() < 4 * (swap / 300).sqrt()).all()
    torch.testing.assert_close(null.var(0), swap, rtol=.3, atol=0)
    assert delta.norm() > 1.5 * null.norm(dim=-1).max()


@pytest.mark.parametrize("method", ["shuffled", "random", "caaa", None, 3])
def test_shuffled_labels_refuses_methods_that_it_cannot_fit(method):
    with pytest.raises(ValueError, match="method must be one of caa, iti, repe"): ShuffledLabels(method)


def test_names_by_kind():
    assert ods.steerer_names(kind="placebo") == ["random", "shuffled"]
    assert not set(ods.steerer_names(kind="placebo")) & set(ods.steerer_names()) and set(ods.steerer_names(kind=None)) == set(ods.REGISTRY)
