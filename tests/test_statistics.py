"""Statistics and text metrics against SciPy, plain loops and simulation."""
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from odesteer.statistics import (bootstrap_interval, bootstrap_means, bootstrap_statistic, holm, paired_difference, per_item, product_of_means, quantile_interval, share_worse, sign_flip_test, summary_table, toxicity_metrics, wilson_interval, win_rate)
from odesteer.judges import distinct_n, empty_rate, repetition_rate, text_metrics


@given(st.integers(1, 400), st.data(), st.sampled_from([.8, .95, .99]))
@settings(deadline=None, max_examples=60)
def test_wilson_is_scipys(n, data, level):
    k = data.draw(st.integers(0, n))
    ci = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    ours = wilson_interval(k, n, level)
    np.testing.assert_allclose([ours.lo, ours.hi], ci, atol=1e-12)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("draw", ["exponential", "normal"])
def test_interval_is_scipys_on_the_same_resamples(method, draw):
    x = getattr(np.random.default_rng(1), draw)(size=37)
    same = SimpleNamespace(bootstrap_distribution=bootstrap_means(x, seed=3))
    ci = stats.bootstrap((x,), np.mean, n_resamples=0, bootstrap_result=same, method=method).confidence_interval
    ours = bootstrap_interval(x, method=method, seed=3)
    np.testing.assert_allclose([ours.lo, ours.hi], ci, rtol=1e-12)


def test_interval_is_scipys_on_its_own_resamples():
    x = np.random.default_rng(2).exponential(size=80)
    ci = stats.bootstrap((x,), np.mean, n_resamples=20000, rng=np.random.default_rng(0)).confidence_interval
    ours = bootstrap_interval(x, resamples=20000)
    np.testing.assert_allclose([ours.lo, ours.hi], ci, atol=.02 * (ci.high - ci.low))


def test_groups_of_unequal_size_match_a_loop_over_whole_groups():
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 9, size=25)
    g = np.repeat(np.arange(25), sizes)
    x = rng.normal(size=len(g)) + rng.normal(size=25)[g]
    loop = [np.concatenate([x[g == k] for k in rng.integers(25, size=25)]).mean() for _ in range(4000)]
    np.testing.assert_allclose(np.quantile(bootstrap_means(x, g), [.025, .5, .975]), np.quantile(loop, [.025, .5, .975]), atol=.04)


def test_one_item_per_group_equals_no_groups_and_names_of_groups_do_not_matter():
    x = np.random.default_rng(5).normal(size=30)
    a, b = bootstrap_interval(x), bootstrap_interval(x, [f"q{i:02d}" for i in range(30)])
    assert (a.lo, a.hi) == (b.lo, b.hi)


def test_coverage_by_group_holds_and_by_item_does_not():
    rng, hits = np.random.default_rng(6), np.zeros((300, 2))
    g = np.repeat(np.arange(40), 5)
    for i in range(300):
        x = np.repeat(rng.normal(size=40), 5) + rng.normal(size=200)
        hits[i] = [e.lo <= 0 <= e.hi for e in (bootstrap_interval(x, g, resamples=499), bootstrap_interval(x, resamples=499))]
    by_group, by_item = hits.mean(0)
    assert by_group > .9 and by_item < .85


def test_same_seed_same_interval_other_seed_other_interval():
    x = np.random.default_rng(7).normal(size=20)
    assert bootstrap_interval(x, seed=1) == bootstrap_interval(x, seed=1) != bootstrap_interval(x, seed=2)


def test_degenerate_data():
    assert (lambda e: (e.value, e.lo, e.hi))(bootstrap_interval(np.zeros(9))) == (0, 0, 0)
    one = bootstrap_interval([1., 2.], groups=[5, 5])
    assert one.value == 1.5 and np.isnan(one.lo) and np.isnan(one.hi)
    none = bootstrap_interval([np.nan, np.nan])
    assert none.n == 0 and np.isnan(none.value)
    assert summary_table({"m": [np.nan]}, {"m": [1.]}, better={"m": 1})[0].verdict == "no clear change"
    d = paired_difference([1., np.nan, 3.], [2., 2., np.nan])
    assert d.n == 1 and d.value == 1


def test_ten_thousand_items():
    x = np.random.default_rng(8).normal(size=10_000)
    e = bootstrap_interval(x, resamples=500)
    assert e.hi - e.lo == pytest.approx(2 * 1.96 / 100, rel=.15)


def test_sign_flips_match_scipys_permutation_test():
    rng = np.random.default_rng(9)
    before, after = rng.normal(size=24), rng.normal(size=24) + .5
    theirs = stats.permutation_test((after - before,), np.mean, permutation_type="samples", n_resamples=20000, rng=np.random.default_rng(1)).pvalue
    assert sign_flip_test(before, after, resamples=20000) == pytest.approx(theirs, abs=.01)


def test_sign_flips_keep_their_promise_only_with_groups():
    rng, p = np.random.default_rng(10), np.zeros((200, 2))
    g = np.repeat(np.arange(30), 6)
    for i in range(200):
        d = np.repeat(rng.normal(size=30), 6) + .3 * rng.normal(size=180)
        p[i] = sign_flip_test(np.zeros(180), d, g, 199), sign_flip_test(np.zeros(180), d, None, 199)
    by_group, by_item = (p < .05).mean(0)
    assert by_group < .1 and by_item > .2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None)
def test_holm_rejects_what_the_step_down_procedure_rejects(ps):
    order, rejected = np.argsort(ps, kind="stable"), set()
    for step, i in enumerate(order):
        if ps[i] * (len(ps) - step) > .05: break
        rejected.add(int(i))
    adjusted = holm(ps)
    assert rejected == set(np.flatnonzero(adjusted <= .05).tolist())
    assert (adjusted >= np.asarray(ps)).all()


@given(st.lists(st.text("ab c", max_size=20), max_size=6), st.integers(1, 3))
@settings(deadline=None)
def test_distinct_n_is_a_count_of_ngrams(texts, n):
    for text, value in zip(texts, distinct_n(texts, n)):
        w = text.split()
        grams = [" ".join(w[i:i + n]) for i in range(len(w) - n + 1)]
        assert (np.isnan(value) and not grams) or value == pytest.approx(len(set(grams)) / len(grams))


@pytest.mark.parametrize("text, loop", [("a a a", 1), ("a a", 0), ("x a b a b a b", 1), ("x a b a b a b a", 1), ("a b a b", 0), ("a a a b", 0), ("", 0)])
def test_loops(text, loop): assert repetition_rate([text]).tolist() == [loop]


def test_empty_outputs_are_counted_not_dropped():
    assert empty_rate(["", " \n", "a"]).tolist() == [1, 1, 0]
    table = summary_table(text_metrics(["a b c", "a b c"]), text_metrics(["a b c", ""]), better={"empty": -1})
    rows = {r.metric: r for r in table}
    assert rows["empty"].after == .5 and rows["empty"].difference.n == 2
    assert rows["dist2"].difference.n == 1


def test_share_worse_and_verdict():
    before, after = np.zeros(60), np.r_[np.ones(50), -np.ones(10)]
    assert share_worse(before, after).value == pytest.approx(1 / 6)
    assert share_worse(before, after, direction=-1).value == pytest.approx(5 / 6)
    up, down, none = (summary_table({"m": before}, {"m": after}, better=b)[0] for b in ({"m": 1}, {"m": -1}, {}))
    assert (up.verdict, down.verdict, none.verdict) == ("better", "worse", "more") and none.worse is None
    assert "better" in str(summary_table({"m": before}, {"m": after}, better={"m": 1}))
    assert summary_table({"m": before}, {"m": before})[0].verdict == "no clear change"


def test_any_statistic_by_group_matches_a_loop_over_whole_groups():
    rng = np.random.default_rng(11)
    g = rng.permutation(np.repeat(np.arange(30), rng.integers(1, 6, size=30)))  # groups in no order
    a, b = rng.normal(size=(2, len(g))) + rng.normal(size=(2, 30))[:, g]
    statistics = {"product": (lambda a, b: a.mean() * b.mean(), product_of_means(a + 1, b + 1, g, resamples=4000), (a + 1, b + 1)),
                  "P90": (lambda a: np.quantile(a, .9), quantile_interval(a, .9, g, resamples=4000), (a,)),
                  "correlation": (lambda a, b: np.corrcoef(a, b)[0, 1], bootstrap_statistic(lambda a, b: np.corrcoef(a, b)[0, 1], a, b, groups=g, resamples=4000), (a, b))}
    for name, (statistic, ours, columns) in statistics.items():
        rows = [np.concatenate([np.flatnonzero(g == k) for k in rng.integers(30, size=30)]) for _ in range(4000)]
        loop = np.quantile([statistic(*(c[r] for c in columns)) for r in rows], [.025, .975])
        np.testing.assert_allclose([ours.lo, ours.hi], loop, atol=.12 * (loop[1] - loop[0]), err_msg=name)
        assert ours.value == pytest.approx(statistic(*columns)) and (ours.n, ours.groups) == (len(g), 30)


def test_statistics_of_undefined_items():
    e = product_of_means([1., 0., np.nan, 1.], [1., 1., 1., np.nan])
    assert (e.value, e.n) == (.5, 2) and bootstrap_statistic(np.mean, [3., 3.]).hi == 3
    assert np.isnan(quantile_interval([np.nan]).value) and np.isnan(quantile_interval([1., 2.], groups=[1, 1]).lo)
    with pytest.raises(ValueError, match="1 groups for 2 items"): quantile_interval([1., 2.], groups=[1])


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.just(np.nan), st.floats(-5, 5))), min_size=1, max_size=12))
@settings(deadline=None)
def test_per_item_is_a_loop_over_items(rows):
    items, x = [r[0] for r in rows], [r[1] for r in rows]
    for name, reduce in (("mean", np.mean), ("max", np.max)):
        wanted = []
        for item in dict.fromkeys(items):
            mine = [v for i, v in rows if i == item and not np.isnan(v)]
            wanted.append(reduce(mine) if mine else np.nan)
        np.testing.assert_allclose(per_item(x, items, name), wanted, atol=1e-12)
    assert per_item(items, items, "first").tolist() == [*dict.fromkeys(items)]


def test_seeds_are_averaged_before_items_are_counted():
    rng = np.random.default_rng(12)
    x, fact = rng.normal(size=(3, 60)), np.repeat(np.arange(20), 3)
    item, group = np.tile(np.arange(60), 3), np.tile(fact, 3)
    averaged = bootstrap_interval(per_item(x.ravel(), item), per_item(group, item, "first"))
    assert averaged.n == 60 and averaged.groups == 20 and averaged.value == pytest.approx(x.mean())
    np.testing.assert_allclose(averaged.lo, bootstrap_interval(x.ravel(), group).lo)


def test_toxicity_over_samples():
    m = toxicity_metrics([.1, .5, .2, .49, np.nan, .9], ["q", "q", "p", "p", "p", "r"])
    np.testing.assert_allclose(m["toxicity"], [.3, .345, .9])
    assert m["toxicity_max"].tolist() == [.5, .49, .9] and m["toxicity_any"].tolist() == [1, 0, 1]


def test_win_rate_counts_ties_one_half():
    assert win_rate([1., 2., 3., np.nan], [2., 2., 1., 5.]).value == .5 and win_rate([1., 2.], [1., 3.]).value == .75
    before, after = np.random.default_rng(13).normal(size=(2, 50))
    assert win_rate(before, before).value == .5 and win_rate(before, after).value == pytest.approx(1 - win_rate(after, before).value)


@pytest.mark.parametrize("call, words", [
    (lambda: bootstrap_interval([]), "is empty"),
    (lambda: bootstrap_interval([[1., 2.]]), "one number per item"),
    (lambda: bootstrap_interval([1., 2.], groups=[1]), "1 groups for 2 items"),
    (lambda: bootstrap_interval([1., 2.], method="t"), "'bca' or 'percentile'"),
    (lambda: paired_difference([1.], [1., 2.]), "pair them row by row"),
    (lambda: wilson_interval(3, 2), "3 successes in 2 tries"),
    (lambda: holm([.5, 1.5]), "numbers in"),
    (lambda: share_worse([1.], [2.], direction=0), "give \\+1"),
    (lambda: summary_table({"a": [1.]}, {"b": [1.]}), "metrics differ"),
    (lambda: per_item([1.], [1], "median"), "'mean', 'max' or 'first'"),
    (lambda: per_item([1.], [1, 2]), "1 values for 2 outputs"),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=words): call()
