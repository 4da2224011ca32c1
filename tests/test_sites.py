"Where activations are read, and how places are ranked by what can be read there"
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

import odesteer as ods
from odesteer.baselines import shuffle_labels
from odesteer.data import ContrastTexts, Pairs, fit_on, fit_steerer, load_pairs, texts_to_read, token_rows
from odesteer.density import PolynomialCountSketch, grouped_folds
from odesteer.euler import contrast, load_class, make_steerer
from odesteer.models import READINGS, collect_activations, encode
from odesteer.cli import main
from odesteer.plans import bench_options, bench_plan
from odesteer.results import find_runs, gather, make_units
from odesteer.runs import Bench, rerun, run_key
from odesteer.sweeps import Search, Stop, benchmark, ranked_sites, sweep
from odesteer.sites import Site, Sites, add_ranking, deal_labels, mean_sites, measure_site, rank_sites, ranking, read_rankings, some_texts

from .archs import CONFIGS, LAYERS, WIDTH, tiny_model, tiny_tokenizer
from .benches import bench, contents, small

#: name -> (template, what it puts behind an answer); the tokens are one a character, but for <s> and </s>
TEMPLATES = {
    "chatml": ("{% if messages[0]['role'] != 'system' %}<s>system\nbe good</s>\n{% endif %}"
               "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
               "{% if add_generation_prompt %}<s>assistant\n{% endif %}", "</s>\n"),
    "llama 3": ("{{ bos_token }}{% for m in messages %}|{{ m['role'] }}|\n\n{{ m['content'] | trim }}</s>{% endfor %}"
                "{% if add_generation_prompt %}|assistant|\n\n{% endif %}", "</s>"),
    "gemma": ("{{ bos_token }}{% for m in messages %}|{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
              "{{ m['content'] | trim }}</s>\n{% endfor %}{% if add_generation_prompt %}|model\n{% endif %}", "</s>\n"),
    "line break alone": ("{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
                         "{% if add_generation_prompt %}a: {% endif %}", "\n"),
    "thinks first": ("{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}</s>\n{% endfor %}"
                     "{% if add_generation_prompt %}a: {% if not enabled %}|{% endif %}{% endif %}", "</s>\n"),
}
PROMPT = [{"role": "user", "content": "who are you?"}]
ANSWERED = [*PROMPT, {"role": "assistant", "content": "it is me"}]


@pytest.fixture(scope="module")
def llama(): return tiny_model("llama", max_position_embeddings=512)


@pytest.fixture(params=TEMPLATES)
def templated(request):
    tok = tiny_tokenizer()
    tok.chat_template, tail = TEMPLATES[request.param]
    return tok, tail


def test_a_tail_is_what_the_template_puts_behind_an_answer(templated):
    tok, tail = templated
    for text in (ANSWERED, (PROMPT, "it is me"), ([{"role": "system", "content": "x"}, *PROMPT], "it is me"), ([*PROMPT, {"role": "assistant", "content": "it"}], " is me")):
        plain, = encode(tok, [text])
        tailed, = encode(tok, [text], ("template",))
        assert plain.tail == 0 and tailed.ids[:-tailed.tail] == plain.ids and tok.decode(tailed.ids[-tailed.tail:]) == tail
        assert tailed.answer == plain.answer
        assert tok.decode(plain.ids).endswith("it is me") and plain.ids.count(tok.bos_token_id) == tailed.ids.count(tok.bos_token_id)


def test_where_the_answer_of_a_chat_begins(templated):
    "A finished chat and a chat with its answer are read at the same tokens"
    tok, _ = templated
    chat, = encode(tok, [ANSWERED], ("mean",))
    assert tok.decode(chat.ids[chat.answer:]) == "it is me"
    assert encode(tok, [ANSWERED])[0].answer == 0  # asked for by nobody, and nothing is cut differently
    alone, = encode(tok, [[{"role": "assistant", "content": "it is me"}]], ("all",)) if "system" not in tok.chat_template else [replace_answer(chat)]
    assert alone.answer == 0


def replace_answer(e): return replace(e, answer=0)


@pytest.mark.parametrize("content", ["it is me ", " it is me", "it is me\n", "it is\n\nme", "</s>"])
def test_answers_with_spaces_at_their_ends(templated, content):
    "A template may strip an answer: the tail is the same, and the answer read is as it was"
    tok, tail = templated
    for text in ((PROMPT, content), [*PROMPT, {"role": "assistant", "content": content}]):
        tailed, = encode(tok, [text], ("template",))
        assert tok.decode(tailed.ids[-tailed.tail:]) == tail and tailed.ids[:-tailed.tail] == encode(tok, [text])[0].ids


@pytest.mark.parametrize("text, template, message", [
    ("who?", "chatml", "text 0 is no chat with an answer"), (("who?", "me"), "chatml", "is no chat with an answer"), (PROMPT, "chatml", "is no chat with an answer"),
    (ANSWERED, None, "no chat template"),
    (ANSWERED, "{% for m in messages %}{{ m['content'] }}{% endfor %}", "puts nothing behind an answer"),
    (ANSWERED, "{% for m in messages %}{{ m['content'] | upper if not add_generation_prompt and loop.last and 'TAG' not in m['content'] else m['content'] }}.{% endfor %}", "changes the answer of text 0")])
def test_texts_without_a_tail(llama, text, template, message):
    tok = tiny_tokenizer()
    tok.chat_template = TEMPLATES[template][0] if template in TEMPLATES else template
    with pytest.raises(ValueError, match=message): collect_activations(llama, tok, [text], layers=1, positions="template", progress=False)


TEXTS = [(PROMPT, "it is me"), (PROMPT, "x"), ([{"role": "user", "content": "why is it so, and not otherwise?"}], "because of a long story, told at night"), ANSWERED]


def brute(model, tok, text, layer, reading):
    "One text at a time, from `hidden_states`"
    e, = encode(tok, [text], (reading,))
    with torch.no_grad(): h = model(torch.tensor([e.ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    answer = h[e.answer:len(e.ids) - e.tail]
    return {"last": answer[-1], "mean": answer.mean(0), "all": answer, "template": h[-1]}[reading]


@pytest.mark.parametrize("arch", [a for a in CONFIGS if a != "mamba"])  # whose list of states is shifted
def test_readings_against_hidden_states(arch):
    "Every reading, one by one and in one pass, in batches of one and of four, whatever the tokenizer's side of padding"
    model, tok = tiny_model(arch), tiny_tokenizer()
    for side in ("left", "right"):
        tok.padding_side = side
        at_once = collect_activations(model, tok, TEXTS, layers=[0, 2], positions=READINGS, progress=False)
        for reading in READINGS:
            one_by_one = collect_activations(model, tok, TEXTS, layers=[0, 2], positions=reading, batch_size=1, progress=False)
            for layer in (0, 2):
                for i, text in enumerate(TEXTS):
                    expected = brute(model, tok, text, layer, reading)
                    torch.testing.assert_close(at_once[reading][layer][i], expected, rtol=2e-3, atol=2e-3)
                    torch.testing.assert_close(one_by_one[layer][i], expected, rtol=2e-3, atol=2e-3)


def test_a_chat_is_read_as_its_prompt_and_answer(llama):
    tok = tiny_tokenizer()
    for reading in READINGS:
        pair, chat = (collect_activations(llama, tok, [t], layers=1, positions=reading, progress=False)[1][0] for t in (TEXTS[0], ANSWERED))
        torch.testing.assert_close(pair, chat)


def test_every_reading_has_a_cache_of_its_own(llama, tmp_path):
    tok = tiny_tokenizer()
    how = dict(layers=[1, 2], progress=False)
    plain = {r: collect_activations(llama, tok, TEXTS, positions=r, **how) for r in READINGS}
    for _ in range(2):  # made, then found
        for r in READINGS:
            kept = collect_activations(llama, tok, TEXTS, positions=r, cache_dir=tmp_path, **how)
            for layer in (1, 2): torch.testing.assert_close(list(kept[layer]), list(plain[r][layer]), rtol=1e-4, atol=1e-4)
        assert len(list(tmp_path.iterdir())) == len(READINGS)
    together = collect_activations(llama, tok, TEXTS, positions=("last", "mean"), cache_dir=tmp_path, **how)
    again = collect_activations(llama, tok, TEXTS, positions=("last", "mean"), cache_dir=tmp_path, **how)
    assert all(torch.equal(together[r][k], again[r][k]) for r in together for k in (1, 2))


def test_truncated_texts_keep_their_tail(llama):
    tok = tiny_tokenizer()
    with pytest.warns(UserWarning, match="longer than 30 tokens"):
        found = collect_activations(llama, tok, TEXTS[:2], layers=1, positions="template", max_length=30, progress=False)[1]
    e = encode(tok, TEXTS[:1], ("template",))[0].ids
    with torch.no_grad(): h = llama(torch.tensor([e[:1] + e[-29:]]), output_hidden_states=True).hidden_states[2][0, -1]
    torch.testing.assert_close(found[0], h, rtol=1e-4, atol=1e-4)


# -- fitting on a reading

def tokens(n, seed=0, width=WIDTH, shift=0.):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(int(k), width, generator=g) + shift for k in torch.randint(1, 6, (n,), generator=g)]


def test_rows_of_tokens():
    pos, neg, source = tokens(3), tokens(3, 1), torch.randn(2, WIDTH)
    groups, pairs = np.array([7, 8, 9, 8, 7, 7]), np.array([(0, 1), (1, 0)])
    P, N, known = token_rows(pos, neg, groups, pairs, source)
    assert torch.equal(P, torch.cat(pos)) and torch.equal(N, torch.cat(neg)) and known["rewards"] == [1.] * 3 + [0.] * 3
    owners = [i for i, a in enumerate([*pos, *neg]) for _ in a]
    assert known["groups"].tolist() == [groups[i] for i in owners]
    rows = iter(zip(known["pairs"], known["source"]))
    for k, (i, j) in enumerate(pairs):
        for a, b in zip(pos[i], neg[j]):  # the k-th token beside the k-th
            (r, s), start = next(rows)
            assert torch.equal(P[r], a) and torch.equal(N[s], b) and torch.equal(start, source[k])
    assert next(rows, None) is None


SETTINGS = {"odesteer": {"n_components": 256}, "step-odesteer": {"n_components": 256}, "truthflow": {"epochs": 2}, "recontrol": {"epochs": 2}, "hpr": {"epochs": 2}}


@pytest.mark.parametrize("method", [m for m in ods.steerer_names() if load_class(m).needs_layer])
def test_every_steerer_takes_every_token(method):
    n = 12
    pos, neg = tokens(n, shift=.5), tokens(n, 1)
    texts = ContrastTexts([str(i) for i in range(n)], [str(i) for i in range(n)], list(range(n)), list(range(n)))
    params = {k: v for k, v in SETTINGS.get(method, {}).items() if k in load_class(method).__init__.__code__.co_varnames}
    source = torch.randn(n, WIDTH) if "source" in getattr(load_class(method), "wants", ()) else None
    steerer = fit_on(pos + neg, texts, method, source, **params)
    moved = steerer.steer(torch.cat(neg), T=1.)
    assert moved.shape == torch.cat(neg).shape and torch.isfinite(moved).all()
    assert not torch.equal(moved, torch.cat(neg))


def test_all_tokens_of_a_mean_difference():
    pos, neg = tokens(5, shift=.5), tokens(4, 1)
    texts = ContrastTexts(["p"] * 5, ["n"] * 4, list(range(5)), list(range(5, 9)))
    caa = fit_on(pos + neg, texts, "caa")
    torch.testing.assert_close(caa.mean_pos_ - caa.mean_neg_, torch.cat(pos).mean(0) - torch.cat(neg).mean(0))


def test_whole_responses_reach_the_method_that_learns_from_them():
    n = 10
    pos, neg = tokens(n, shift=.5), tokens(n, 1)
    texts = ContrastTexts(["p"] * n, ["n"] * n, list(range(n)), list(range(n)))
    params = dict(epochs=3)
    by_hand = make_steerer("recontrol", **params).fit(
        torch.cat(pos), torch.cat(neg), sequences=[*pos, *neg], rewards=[1.] * n + [0.] * n,
        groups=np.repeat([*range(n)] * 2, [len(a) for a in (*pos, *neg)]))
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(fit_on(pos + neg, texts, "recontrol", **params).steer(x, T=1.), by_hand.steer(x, T=1.))


def test_the_placebo_deals_labels_to_whole_answers():
    n = 12
    pos, neg = tokens(n, shift=9.), tokens(n, 1)
    for i, a in enumerate([*pos, *neg]): a[:, 0] = i  # which answer a token belongs to
    pairs = np.array([(i, i) for i in range(n)])
    for known in (dict(pairs=pairs), {}):
        P, N, rows = token_rows(pos, neg, np.array([*range(n)] * 2), **known)
        dealt = shuffle_labels(contrast(P, N, **rows), seed=3)
        wanted, unwanted = (set(x[:, 0].tolist()) for x in (dealt.pos, dealt.neg))
        assert not wanted & unwanted and wanted | unwanted == set(range(2 * n)) and len(wanted) == n
        assert 2 < len(wanted & set(range(n))) < n  # some changed sides
        assert len(dealt.pos) + len(dealt.neg) == len(P) + len(N)
        assert (dealt.rewards == torch.tensor([1.] * n + [0.] * n)).all() and len(dealt.sequences) == 2 * n


@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa")/"pairs.jsonl"
    rows = [{"q": f"what is number {i}?", "pos": f"it is {i}, surely", "neg": f"nobody knows {i}."} for i in range(16)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("template", [None, "chat", "{question} {answer}"])
def test_answers_are_read_without_their_questions(llama, qa, template):
    pairs, tok = load_pairs(qa, question="q", template=template), tiny_tokenizer()
    for reading in ("mean", "all"):
        texts = texts_to_read(pairs, [reading])
        whole, apart = encode(tok, [*pairs.pos, *pairs.neg], [reading]), encode(tok, texts, [reading])
        assert [e.ids for e in whole] == [e.ids for e in apart]  # the same tokens
        assert [tok.decode(e.ids[e.answer:]).strip() for e in apart] == [*pairs.pos_answers, *pairs.neg_answers]
    assert texts_to_read(pairs, ["last"]) == [*pairs.pos, *pairs.neg]
    answers = load_pairs(qa)
    assert texts_to_read(answers, ["mean"]) == [*answers.pos, *answers.neg]


def test_the_card_says_what_was_read(llama, qa, tmp_path):
    pairs, tok = load_pairs(qa, question="q", template="chat"), tiny_tokenizer()
    v = {}
    for reading in READINGS:
        steerer = fit_steerer(llama, tok, pairs, "caa", layer=1, reading=reading)
        assert steerer.about["positions"] == reading
        acts = collect_activations(llama, tok, pairs.pos + pairs.neg, layers=1, positions=reading, progress=False)[1]
        both = [torch.cat(part) if reading == "all" else part for part in (acts[:16], acts[16:])]
        v[reading] = steerer.mean_pos_ - steerer.mean_neg_
        torch.testing.assert_close(v[reading], both[0].mean(0) - both[1].mean(0), rtol=1e-4, atol=1e-4)
        steerer.save_pretrained(tmp_path/reading)
        assert ods.load_steerer(tmp_path/reading).about["positions"] == reading
    assert len({tuple(x.tolist()) for x in v.values()}) == len(READINGS)
    assert torch.equal(fit_steerer(llama, tok, pairs, "caa", layer=1).mean_pos_, fit_steerer(llama, tok, pairs, "caa", layer=1, reading="last").mean_pos_)
    with pytest.raises(ValueError, match="alqr acts on all blocks and reads them at the last token itself"): fit_steerer(llama, tok, pairs, "alqr", reading="mean")
    with pytest.raises(ValueError, match="reading must be one of last, mean, template, all; got 'first'"): fit_steerer(llama, tok, pairs, "caa", reading="first")


# -- ranking

def planted(n=80, width=24, seed=0, strength=2.):
    "Activations of three layers, of which only the middle one knows the class; two texts a group"
    rng = np.random.default_rng(seed)
    y, groups = np.tile([1, 0], n // 2), np.repeat(np.arange(n // 2), 2)
    acts = [rng.normal(size=(n, width)) for _ in range(3)]
    acts[1][:, 3] += strength * (2 * y - 1)
    return [torch.tensor(a, dtype=torch.float32) for a in acts], y, groups


def test_the_planted_layer_is_found_and_a_placebo_finds_nothing():
    acts, y, groups = planted()
    found = Sites(measure_site(a, y, groups, layer=k) for k, a in enumerate(acts))
    assert max(found, key=lambda s: s.auc).layer == min(found, key=lambda s: s.log_loss).layer == 1
    assert found[1].auc > .9 and found[1].log_loss < .5 and all(abs(found[k].auc - .5) < .2 and found[k].log_loss > .6 for k in (0, 2))
    assert found[1].calibrated < found[1].published - .05 and all(found[k].calibrated > .6 for k in (0, 2))
    placebo = [measure_site(acts[1], deal_labels(y, groups, s), groups).auc for s in range(6)]
    assert abs(np.mean(placebo) - .5) < .1


def test_groups_are_never_split():
    "Where every group has a direction of its own and one label, only a barrier that has seen the group can know the label"
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 6)
    y = (groups % 2).astype(int)
    a = torch.tensor(rng.normal(size=(30, 40))[groups] * 3 + rng.normal(size=(180, 40)) * .1, dtype=torch.float32)
    assert measure_site(a, y, np.arange(180)).auc > .95 > .7 > measure_site(a, y, groups).auc


def test_a_site_against_scikit_learn():
    "AUC, log-loss, norm, spread and largest coordinate, made another way"
    acts, y, groups = planted(strength=.7)
    found = measure_site(acts[1], y, groups, seed=2, width=300)
    order = np.argsort(-y, kind="stable")
    X, labels, ids = acts[1][torch.tensor(order)].double(), y[order], groups[order]
    sketch = PolynomialCountSketch(300).fit(X, 2)
    Z, losses = sketch(X / X.norm(dim=1, keepdim=True)).numpy(), {}
    for C in (1., 100., 1e4):
        p = np.zeros(len(labels))
        for train, test in grouped_folds(labels, ids, 5, 2):
            assert not set(ids[train]) & set(ids[test])
            w = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(Z[train], labels[train])
            prior = np.log((labels[train] == 0).sum() / (labels[train] == 1).sum())
            p[test] = 1 / (1 + np.exp(-(w.decision_function(Z[test]) + prior)))
        losses[C] = log_loss(labels, p), roc_auc_score(labels, p)
        if C == 1: published, flat = losses[C][0], np.log(p / (1 - p))
    best = min(losses, key=lambda C: losses[C][0])
    assert found.C == best and abs(found.log_loss - losses[best][0]) < 1e-3 and abs(found.auc - losses[best][1]) < 2e-3
    mended = np.zeros(len(labels))
    for train, test in grouped_folds(labels, ids, 5, 2):  # slope and intercept, towards labels that are not quite sure
        y_, h = labels[train], flat[train][:, None]
        n = np.where(y_ == 1, (y_ == 1).sum(), (y_ == 0).sum())
        sure = (y_ * n + 1) / (n + 2)
        w = LogisticRegression(C=1e8, tol=1e-12, max_iter=10_000).fit(np.r_[h, h], np.r_[np.ones(len(y_)), np.zeros(len(y_))], np.r_[sure / n, (1 - sure) / n])
        mended[test] = w.predict_proba(flat[test][:, None])[:, 1]
    assert abs(found.published - published) < 1e-3 and abs(found.calibrated - log_loss(labels, mended)) < 1e-3
    x = acts[1].double().numpy()
    assert np.isclose(found.norm, np.median(np.linalg.norm(x, axis=1)), rtol=1e-2)
    assert np.isclose(found.spread, np.median(np.linalg.norm(x - x.mean(0), axis=1)), rtol=1e-2)
    assert np.isclose(found.largest, (x**2).mean(0).max() / (x**2).mean(0).sum(), rtol=1e-4)


def test_dealt_labels_keep_the_balance_of_groups():
    y, groups = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0]), np.array(list("aabbbbcdef"))
    deals = [deal_labels(y, groups, seed) for seed in range(40)]
    for d in deals: assert d.sum() == y.sum() and all(d[groups == g].sum() == y[groups == g].sum() for g in "ab")
    assert {tuple(d[:2]) for d in deals} == {(0, 1), (1, 0)} and len({tuple(d[6:]) for d in deals}) == 6  # 4 over 2
    assert (deal_labels(y, groups, 3) == deals[3]).all()


def contrast_texts(n=24):
    return ContrastTexts([f"number {i} is fine" for i in range(n)], [f"number {i} is bad" for i in range(n)], list(range(n)), list(range(n)))


def test_all_places_of_a_model_in_one_pass(llama, monkeypatch):
    tok, texts = tiny_tokenizer(), contrast_texts()
    passes = []
    real = ods.collect_activations
    monkeypatch.setattr(ods, "collect_activations", lambda *a, **k: passes.append(1) or real(*a, **k), raising=False)
    found = rank_sites(llama, tok, texts, readings=("last", "mean"))
    assert len(passes) == 1 and len(found) == 2 * LAYERS and [s.log_loss for s in found] == sorted(s.log_loss for s in found)
    acts = real(llama, tok, texts.pos + texts.neg, layers=2, positions="mean", progress=False)[2]
    alone = measure_site(acts, np.repeat([1, 0], 24), np.tile(np.arange(24), 2), 2, "mean")
    assert np.isclose(found.at(2, "mean").auc, alone.auc, atol=5e-3) and np.isclose(found.at(2, "mean").norm, alone.norm, rtol=1e-3)
    assert rank_sites(llama, tok, texts, layers=[1, 3], readings=["last"]).at(3, "last") == found.at(3, "last")
    placebo = rank_sites(llama, tok, texts, readings=["last"], shuffle=1)
    assert abs(np.mean([s.auc for s in placebo]) - .5) < .25 and placebo.at(1, "last").norm == found.at(1, "last").norm
    with pytest.raises(ValueError, match="reading must be one of"): rank_sites(llama, tok, texts, readings=["first"])
    with pytest.raises(ValueError, match="leave out the reading 'all'"): rank_sites(llama, tok, texts, readings=["mean", "all"])


def test_texts_are_drawn_by_group():
    texts = ContrastTexts([f"p{i}" for i in range(40)], [f"n{i}" for i in range(40)], [i // 4 for i in range(40)], [i // 4 for i in range(40)])
    some = some_texts(texts, 30, seed=1)
    assert len(some.pos) == len(some.neg) == 12 and set(some.pos_groups) == set(some.neg_groups)
    for t, g in zip(some.pos, some.pos_groups): assert texts.pos_groups[texts.pos.index(t)] == g
    assert some_texts(texts, 30, seed=1) == some != some_texts(texts, 30, seed=2) and some_texts(texts, 80) is texts is some_texts(texts, None)
    pairs = Pairs([f"Q: {i}\nA: p" for i in range(9)], [f"Q: {i}\nA: n" for i in range(9)], [*range(9)], [*range(9)], "Q: {question}\nA: {answer}", ["p"] * 9, ["n"] * 9)
    cut = some_texts(pairs, 8)
    assert len(cut.pos) == len(cut.pos_answers) == len(cut.neg_answers) == 4 and cut.template == pairs.template


def sites(*rows): return Sites(Site(layer, reading, auc, 1 - auc, 1., 1., 1., .1, .69, .68) for layer, reading, auc in rows)


def test_the_best_places_are_no_neighbours():
    found = sites(*((k, "mean", .95 - abs(k - 14) * .01) for k in sorted(range(30), key=lambda k: abs(k - 14))), *((k, "last", .5) for k in range(30)))
    assert [s.layer for s in found.best(3)] == [14, 11, 17] and [s.layer for s in found.best(3, apart=1)] == [14, 13, 15]
    assert [(s.layer, s.reading) for s in sites((2, "mean", .9), (2, "last", .8), (1, "mean", .7)).best(2)] == [(2, "mean"), (2, "last")]
    assert len(found.best(99)) == 20


def test_means_over_folds_and_a_table():
    a, b = sites((0, "last", .9), (1, "last", .6)), sites((0, "last", .5), (1, "last", .7))
    both = mean_sites([a, b])
    assert [(s.layer, round(s.auc, 9)) for s in both] == [(0, .7), (1, .65)] and mean_sites([a]) is a
    text = repr(both)
    assert len(text.splitlines()) == 3 and "0.700" in text and "log-loss" in text
    assert repr(Sites(Site(**row) for row in json.loads(json.dumps(a.rows())))) == repr(a)


def test_a_file_keeps_rankings_apart(llama, tmp_path):
    texts, path = contrast_texts(6), tmp_path/"sites.json"
    def record(label, auc, **how): return ranking(sites((0, "last", auc)), llama, "tiny", texts, label, **how)
    for r in (record("a", .5, seed=0), record("b", .6, seed=0), record("a", .7, seed=1), record("a", .8, seed=0)): add_ranking(path, r)
    kept = read_rankings(path)
    assert [(r["texts"]["name"], r["how"]["seed"], r["sites"][0].auc) for r in kept] == [("b", 0, .6), ("a", 1, .7), ("a", 0, .8)]
    assert kept[0]["model"]["blocks"] == LAYERS and kept[0]["texts"]["wanted"] == 6 and "number" not in path.read_text()


@pytest.mark.parametrize("text", ["", "[{", "{}", "[3]", '[{"model": {}}]', "[" * 100_000])
def test_a_damaged_file_of_rankings_is_named_and_kept(llama, tmp_path, text):
    path = tmp_path/"sites.json"
    path.write_text(text)
    record = ranking(sites((0, "last", .5)), llama, "tiny", contrast_texts(6), "a")
    for use in (lambda: add_ranking(path, record), lambda: read_rankings(path)):
        with pytest.raises(ValueError, match="the file is damaged") as e: use()
        assert str(path) in str(e.value) and path.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["sites.json"]


def test_rankings_that_are_added_at_once_are_all_kept(llama, tmp_path):
    texts, path = contrast_texts(6), tmp_path/"sites.json"
    records = [ranking(sites((0, "last", .5)), llama, "tiny", texts, "a", seed=i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool: list(pool.map(lambda r: add_ranking(path, r), records))
    assert sorted(r["how"]["seed"] for r in read_rankings(path)) == [*range(12)]


# -- a pretrained model

def test_the_tail_of_a_pretrained_model(smollm2):
    model, tok = smollm2
    chats = [([{"role": "user", "content": "What is 2 + 2?"}], "It is 4."), ([{"role": "user", "content": "Who are you?"}], "Me")]
    coded = encode(tok, chats, READINGS)
    assert [tok.decode(e.ids[-e.tail:]) for e in coded] == ["<|im_end|>\n"] * 2 and [tok.decode(e.ids[e.answer:-e.tail]) for e in coded] == ["It is 4.", "Me"]
    found = collect_activations(model, tok, chats, layers=14, positions=READINGS, progress=False)
    for i, e in enumerate(coded):
        with torch.no_grad(): h = model(torch.tensor([e.ids]), output_hidden_states=True).hidden_states[15][0]
        n = len(e.ids) - e.tail
        for reading, expected in {"last": h[n - 1], "mean": h[e.answer:n].mean(0), "template": h[-1]}.items():
            torch.testing.assert_close(found[reading][14][i], expected, rtol=1e-3, atol=1e-2)


# -- runs and sweeps

@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


def test_where_texts_are_read_belongs_to_a_steered_run_alone(lm, tmp_path):
    b = bench(lm, tmp_path)
    m, t = b.read_at("mean"), bench(lm, tmp_path, reading="mean")
    caa, loop = ("caa", 1, {"share": .3}), ("alqr", None, {"T": 1.})
    assert b.read_at("last") is b and m.read_at("last").config(*caa) == b.config(*caa) and "reading" not in b.config(*caa)
    assert m.config(*caa) == t.config(*caa) == {**b.config(*caa), "reading": "mean"} and run_key(m.config(*caa)) != run_key(b.config(*caa))
    assert m.config() == b.config() and m.config(*loop) == b.config(*loop)
    texts = b.task.folds[0].texts
    pairs = [b.task.split(x) for x in texts.pos + texts.neg]
    for reading in ("mean", "all"):
        own = collect_activations(lm.model, lm.tokenizer, pairs, layers=1, positions=reading, progress=False)[1]
        torch.testing.assert_close(list(b.read_at(reading).acts(0, 1)), list(own), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="reading must be one of"): bench(lm, tmp_path, reading="first")


@pytest.mark.parametrize("reading", ["mean", "all"])
def test_a_run_on_another_reading_is_made_again(lm, tmp_path, reading):
    b = bench(lm, tmp_path/"a", n=3).read_at(reading)
    run = b.run("odesteer", 1, {"spread": .5}, {"n_components": 300})
    steerer = b.steerer("odesteer", 1, {"n_components": 300})
    assert steerer.about["positions"] == reading and run.summary["moved"] > 0 and run.config["reading"] == reading
    again = rerun(run.config, tmp_path/"b", lm.model, lm.tokenizer, small(lm, n=3))
    assert again.key == run.key and contents(tmp_path/"a") == contents(tmp_path/"b")
    plain = bench(lm, tmp_path/"a", n=3)
    assert "positions" not in plain.steerer("odesteer", 1, {"n_components": 300}).about
    assert not torch.equal(plain.steerer("odesteer", 1, {"n_components": 300}).barrier.coef_, steerer.barrier.coef_)
    assert plain.strength("odesteer", 1, {"angle": 5}, {"n_components": 300}) != b.strength("odesteer", 1, {"angle": 5}, {"n_components": 300})


def test_a_sweep_over_readings(lm, tmp_path):
    b = bench(lm, tmp_path, n=3)
    usual = Search([1], [{"share": .2}], refine=0, repeats=1, seeds=1)
    over = replace(usual, readings=["last", "mean"])
    choice = sweep(b, "caa", over)
    assert {(t.layer, t.reading) for t in choice.trials} == {(1, "last"), (1, "mean")}
    saved, = (json.loads(p.read_text()) for p in (tmp_path/"choices").glob("*.json"))
    assert saved["config"]["places"] == [[1, "last"], [1, "mean"]] and saved["config"]["layers"] == [1] and "ranking" not in saved
    assert sweep(b, "caa", over) == choice
    assert sweep(b, "caa", usual) == sweep(b, "caa", replace(usual, readings=["last"])) and len(list((tmp_path/"choices").iterdir())) == 2  # one key
    benchmark(b, ["caa"], over, curve=False)
    tests = [r for r in find_runs([tmp_path]).runs.values() if r.config["split"] == "test" and r.config["arm"] == "steer"]
    assert choice.strength is None or {r.config.get("reading", "last") for r in tests} == {choice.reading}


def test_a_chosen_reading_is_named_in_tables(lm, tmp_path, monkeypatch):
    "The mean wins here: its run's arm says so, and the choice finds it"
    b = bench(lm, tmp_path, n=3)
    way = b.task.better[b.task.primary]
    monkeypatch.setattr("odesteer.sweeps.stop_rule", lambda values, base, runs, *a, **k: Stop(len(runs) - 1, "all is well", ended=False))
    real = Bench.repeated
    def repeated(self, *args, **kwargs):
        run = real(self, *args, **kwargs)
        if self.task.reading == "mean": run.scores[self.task.primary] = run.scores[self.task.primary] + way
        return run
    monkeypatch.setattr(Bench, "repeated", repeated, raising=False)
    search = Search([1], [{"share": .2}], refine=0, repeats=1, seeds=1, readings=["last", "mean"])
    benchmark(b, ["caa"], search, curve=False)
    found = find_runs([tmp_path])
    unit, = make_units(found)
    assert unit.mains()["caa"] == "caa (reading=mean)" and len(unit.chosen("caa (reading=mean)")) == 1
    row, = [r for r in gather([tmp_path], resamples=99)["scopes"][0]["rows"] if r["method"] == "caa"]
    assert row["arm"] == "caa (reading=mean)" and tuple(row["chosen"][0]) == (1, {"share": .2})


def test_ranked_places_are_read_once_and_the_best_are_swept(lm, tmp_path, monkeypatch):
    b, passes = bench(lm, tmp_path, n=3), []
    real = rank_sites
    monkeypatch.setattr("odesteer.sweeps.rank_sites", lambda *a, **k: passes.append(1) or real(*a, **k))
    search = Search("ranked", [{"share": .2}], refine=0, repeats=1, readings=["last", "mean"], most=2)
    choices = [sweep(b, m, search) for m in ("caa", "iti", "alqr")]
    best = ranked_sites(b, ["last", "mean"]).best(2)
    assert len(passes) == 1
    for choice in choices[:2]: assert [(t.layer, t.reading) for t in choice.trials] == [(s.layer, s.reading) for s in best]
    assert all(t.layer is None and t.reading == "last" for t in choices[2].trials)
    saved = [json.loads(p.read_text()) for p in (tmp_path/"choices").glob("*.json")]
    assert sorted(len(c.get("ranking", [])) for c in saved) == [0, 8, 8]
    listed = Search(sorted({s.layer for s in ranked_sites(b, ["last"]).best(2)}), [{"share": .2}], refine=0, repeats=1)
    assert "ranking" not in json.loads((tmp_path/"sites").glob("*.json").__next__().read_text())
    assert sweep(b, "caa", listed).layer in (*listed.layers, None)
    for bad, message in ((dict(layers="best"), "layers must be"), (dict(layers="ranked", most=0), "most must be"), (dict(readings=["first"]), "reading must be"),
                         (dict(layers="ranked", readings=["all"]), "leave out the reading 'all'")):
        with pytest.raises(ValueError, match=message): Search(**bad)


# -- the shell

@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama):
    at = tmp_path_factory.mktemp("model")
    llama.save_pretrained(at)
    tiny_tokenizer().save_pretrained(at)
    return at


def test_commands_that_say_where_to_read(folder, qa, tmp_path, capsys):
    fit = ["fit", "--model", str(folder), "--pairs", str(qa), "--question", "q", "--method", "caa", "--layer", "1"]
    assert main([*fit, "--template", "chat", "--reading", "template", "--out", str(tmp_path/"s")]) == 0
    assert ods.load_steerer(tmp_path/"s").about["positions"] == "template"
    assert main([*fit, "--reading", "template", "--out", str(tmp_path/"t")]) == 2 and "is no chat with an answer" in capsys.readouterr().err
    assert main([*fit[:-4], "--method", "alqr", "--reading", "mean", "--out", str(tmp_path/"u")]) == 2 and "leave out the reading" in capsys.readouterr().err
    rank = ["sites", "--model", str(folder), "--pairs", str(qa), "--question", "q", "--limit", "24", "--reading", "last,mean", "--out", str(tmp_path/"sites.json")]
    for more in ([], ["--shuffle", "1"], ["--coordinates", "standardised"], []): assert main([*rank, *more]) == 0
    said = capsys.readouterr().out
    assert said.count("log-loss") == 4
    kept = read_rankings(tmp_path/"sites.json")
    assert [(r["how"]["shuffle"], r["how"]["coordinates"]) for r in kept] == [(1, "raw"), (None, "standardised"), (None, "raw")]
    assert all(len(r["sites"]) == 2 * LAYERS for r in kept) and kept[0]["model"]["name"] == folder.name and kept[0]["texts"]["name"] == "pairs"
    assert main([*rank[:-4], "--reading", "first"]) == 2 and main([*rank[:-1], str(tmp_path/"no"/"sites.json")]) == 2


def test_a_plan_that_ranks():
    plan, _ = bench_plan(bench_options({"tasks": ["micro-truth"], "layers": "ranked", "reading": "last,mean", "methods": "caa"}))
    assert plan.search.layers == "ranked" and plan.search.readings == ["last", "mean"]
    assert bench_plan(bench_options({"tasks": ["micro-truth"], "methods": "caa"}))[0].search == Search()
    with pytest.raises(ValueError, match="reading must be one of"): bench_options({"reading": "first"})


def test_committed_rankings():
    "Numbers of two models, no texts; what a shuffle of labels leaves is nothing"
    records = read_rankings()
    assert {r["model"]["name"] for r in records} == {"smollm2", "gemma3-270m"}
    for r in records:
        aucs = [s.auc for s in r["sites"]]
        if r["how"]["shuffle"] is None: assert max(aucs) > .8
        else: assert abs(np.mean(aucs) - .5) < .06
        assert len(aucs) == r["model"]["blocks"] * len(r["how"]["readings"]) and set(r["texts"]) == {"name", "wanted", "unwanted", "sha256"}
