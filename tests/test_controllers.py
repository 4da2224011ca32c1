"What every controller of the registry promises, whatever its method"
import copy
import inspect
import json
import pickle
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.euler import Edit, Edits
from odesteer.hooks import Steering, generate_text, score_continuations
from odesteer.models import decoder_layers

from .archs import LAYERS, VOCAB, WIDTH, tiny_model, tiny_tokenizer, untouched
from .project import rewrite

NAMES = ods.steerer_names("controller")
SMALL = {"barrier-lqr": dict(n_components=64)}  # hyper-parameters that make a method quick to fit
CONSTANT = {"pid-act"}  # adds the same whatever the activation: its strength is a push, and 0 is no push
GREEDY = dict(max_new_tokens=6, do_sample=False)
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
MODELS, TOK = {}, tiny_tokenizer()


def the_model(arch="llama", dtype=torch.float32):
    "One model per architecture and dtype; every test leaves it as it was"
    if (arch, dtype) not in MODELS: MODELS[arch, dtype] = tiny_model(arch).to(dtype)
    return MODELS[arch, dtype]


def sentences(letters, n, seed):
    "Random words; the last letter of each tells the class"
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(2, 12))) + rng.choice(letters) for _ in range(n)]


POS, NEG = sentences("abcdefg", 24, 0), sentences("tuvwxyz", 20, 1)
IDS = torch.randint(4, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])


def made(name, **extra):
    takes = inspect.signature(ods.euler.load_class(name)).parameters
    return ods.make_steerer(name, **{**({"n_jacobian": 3} if "n_jacobian" in takes else {}), **SMALL.get(name, {}), **extra})


def fit(name, model=None, **extra): return made(name, **extra).fit(model or the_model(), TOK, POS, NEG, progress=False)


@pytest.fixture(scope="module", params=NAMES)
def name(request): return request.param


@pytest.fixture(scope="module")
def ctl(name): return fit(name)


@pytest.fixture
def folder(ctl, tmp_path):
    ctl.save_pretrained(tmp_path)
    return tmp_path


def logits(model, ids=IDS, mask=None):
    with torch.no_grad(): return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def steered(ctl, model=None, strength=1.5, ids=IDS, mask=None, **kw):
    with ods.steering(model or the_model(), ctl, strength=strength, **kw): return logits(model or the_model(), ids, mask)


def outputs(model, mask=None, ids=IDS):
    "What every block gives, as hooks set last see it: (L, batch, n, d)"
    seen = []
    hooks = [block.register_forward_hook(lambda m, a, y: seen.append(y if torch.is_tensor(y) else y[0])) for block in decoder_layers(model)]
    logits(model, ids, mask)
    for h in hooks: h.remove()
    return torch.stack(seen)


def chain(ctl, x, strength=1., model=None):
    "The edits of all blocks in order, on rows of our own: block t gives x_t + t"
    edits, value = ctl.edits(model or the_model(dtype=x.dtype), None, strength), ctl.resolve(strength)
    for t in range(LAYERS):
        y = x + t
        x = edits[t](x, y, value) if t in edits else y
    return x


# ---- the fit

def test_fit_returns_the_controller_and_says_so(name):
    c = made(name)
    assert "not fitted" in repr(c) and fit(name).width == WIDTH and c.fit(the_model(), TOK, POS, NEG, progress=False) is c
    assert f"fitted on {len(POS)} + {len(NEG)} texts of width {WIDTH}, {LAYERS} blocks" in repr(c)


def test_it_does_something(ctl):
    plain = logits(the_model())
    with ods.steering(the_model(), ctl, strength=1.5) as h: moved = logits(the_model())
    assert h.applied == 3 * len(ctl._blocks()) and not torch.allclose(moved[:, -1], plain[:, -1]) and torch.equal(moved[:, :-1], plain[:, :-1])
    assert moved.isfinite().all()


def test_strength_is_a_number_that_matters(name, ctl):
    by = {s: steered(ctl, strength=s) for s in (0., 1., 2.)}
    assert not torch.equal(by[1.], by[2.]) and torch.equal(steered(ctl, strength=dict(T=2.)), by[2.]) and torch.equal(steered(ctl, strength=torch.tensor(2)), by[2.])
    assert torch.equal(by[0.], logits(the_model())) == (name in CONSTANT)  # a set-point of 0 is a set-point too
    with ods.steering(the_model(), ctl): assert torch.equal(logits(the_model()), by[1.])


def test_the_same_fit_again(name, ctl):
    again = fit(name)
    assert again.card == ctl.card and all(torch.equal(again.state_dict()[k], v) for k, v in ctl.state_dict().items())
    again.fit(the_model(), TOK, NEG, POS, progress=False)
    steered(again, the_model(dtype=torch.float64))  # makes a float64 copy, which must not outlive the next fit
    again.fit(the_model(), TOK, POS, NEG, progress=False)
    for dtype in DTYPES[:2]: assert torch.equal(steered(again, the_model(dtype=dtype)), steered(ctl, the_model(dtype=dtype)))


def test_seed_decides_which_texts_are_read(name):
    if "n_texts" not in made(name).params: pytest.skip("reads all texts")
    a, b, c = (fit(name, n_texts=8, seed=s) for s in (0, 0, 1))
    assert a.card["fit"]["n_pos"] == a.card["fit"]["n_neg"] == 8
    assert torch.equal(steered(a), steered(b)) and not torch.equal(steered(a), steered(c))


def test_leaves_model_texts_and_global_generators_alone(name, ctl):
    model, texts = the_model(), (list(POS), list(NEG))
    weights, states = {k: v.clone() for k, v in model.state_dict().items()}, (random.getstate(), np.random.get_state(), torch.get_rng_state())  # compared only, nothing is drawn
    fit(name), steered(ctl)
    assert random.getstate() == states[0] and all(map(np.array_equal, np.random.get_state(), states[1])) and torch.equal(torch.get_rng_state(), states[2])
    assert (POS, NEG) == texts and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters()) and not any(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_answers_and_chats_can_be_fitted_on(name):
    pairs = made(name).fit(the_model(), TOK, [(p[:1], p[1:]) for p in POS], [(n[:1], n[1:]) for n in NEG], progress=False)
    torch.testing.assert_close(steered(pairs), steered(fit(name)), rtol=1e-3, atol=1e-3) if name not in CONSTANT else None
    chats = made(name).fit(the_model(), TOK, [[{"role": "user", "content": p}] for p in POS], [[{"role": "user", "content": n}] for n in NEG], progress=False)
    assert "chat template" in chats.about["prompt_format"] and "plain" in fit(name).about["prompt_format"]


# ---- off means off

def test_the_model_comes_back_bit_for_bit(ctl):
    model = the_model()
    before = logits(model)
    assert not torch.equal(steered(ctl), before) and torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError):
        with ods.steering(model, ctl): 1 / 0
    first, second = ods.steering(model, ctl), ods.steering(model, ctl, strength=2.)
    first.remove()
    twice = logits(model)
    second.remove()
    assert torch.equal(logits(model), before) and torch.equal(twice, steered(ctl, strength=2.))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and "generate" not in vars(model)


def test_a_pass_that_breaks_off_leaves_nothing_behind(ctl):
    model, other = the_model(), IDS.flip(0)
    expected = steered(ctl)
    def broken(*_): raise ZeroDivisionError
    with ods.steering(model, ctl, strength=1.5):
        for t in range(LAYERS):
            trap = decoder_layers(model)[t].register_forward_hook(broken)
            with pytest.raises(ZeroDivisionError): logits(model, other[:2])
            trap.remove()
            assert torch.equal(logits(model), expected)


def test_two_models_share_one_controller(ctl):
    "Passes of two models that take turns, block by block, as threads may"
    twin = copy.deepcopy(the_model())
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    expected, value = [chain(ctl, row, 1.5) for row in x], ctl.resolve(1.5)
    both, now = [ctl.edits(m, None, 1.5) for m in (the_model(), twin)], list(x)
    for t in range(LAYERS): now = [edits[t](row, row + t, value) if t in edits else row + t for edits, row in zip(both, now)]
    for got, want in zip(now, expected): assert torch.equal(got, want)


# ---- rows

def test_a_strength_for_every_row(ctl):
    T = torch.tensor([0., 1., 2.])
    out = steered(ctl, strength=T)
    for i, t in enumerate(T.tolist()): torch.testing.assert_close(out[i], steered(ctl, strength=t, ids=IDS[i:i + 1])[0])
    with pytest.raises(ValueError, match="strength has 2 rows, but there are 3 in the batch"): steered(ctl, strength=T[:2])


def test_a_batch_is_its_rows(ctl):
    out = steered(ctl)
    for i in range(3): torch.testing.assert_close(out[i], steered(ctl, ids=IDS[i:i + 1])[0])


@pytest.mark.parametrize("positions", ["last", "all"])
def test_pads_are_left_alone(ctl, positions):
    plain = outputs(the_model(), LEFT)
    with ods.steering(the_model(), ctl, strength=1.5, positions=positions) as h: moved = outputs(the_model(), LEFT)
    if positions == "last": assert torch.equal(moved[:, :, :-1], plain[:, :, :-1])
    assert torch.equal(moved[:, LEFT == 0], plain[:, LEFT == 0]) and h.applied == len(ctl._blocks()) * (3 if positions == "last" else LEFT.sum())
    steers = sorted(ctl._blocks())[0]
    assert not torch.equal(moved[steers:, :, -1], plain[steers:, :, -1])


def test_left_padding_changes_nothing(ctl):
    prompts = ["ab", "the quick brown fox", "a"]
    with ods.steering(the_model(), ctl, strength=1.5):
        together = generate_text(the_model(), TOK, prompts, **GREEDY)
        apart = [generate_text(the_model(), TOK, [p], **GREEDY)[0] for p in prompts]
        assert together == apart == generate_text(the_model(), TOK, prompts, batch_size=2, **GREEDY)
    assert together != generate_text(the_model(), TOK, prompts, **GREEDY)


def test_all_positions_are_each_steered_by_their_own_state(ctl):
    "One token at a time through an own loop over the blocks' edits"
    seen = {}
    class Spy:
        def edits(self, model, layer, strength): return {t: lambda x, y, value, t=t, edit=edit: seen.setdefault(t, (x, y, edit(x, y, value)))[2] for t, edit in ctl.edits(model, layer, strength).items()}
    steered(Spy(), positions="all")
    again, value = ctl.edits(the_model(), None, 1.5), ctl.resolve(1.5)
    for token in (0, 4, 20):
        for t, (x, y, moved) in seen.items(): torch.testing.assert_close(again[t](x[token:token + 1], y[token:token + 1], value)[0], moved[token])


def test_a_controller_answers_what_hooks_and_sweeps_ask(ctl):
    assert isinstance(ctl, Edits) and not ctl.needs_layer and ctl.strength_names == {"T": "set-point"}
    assert ctl.strength_units == ("T",) and ctl.default_strength == {"T": 1.}
    assert [x for strength in ctl.strengths for x in strength.values()] == [.25, .5, 1., 2., 4., 8., 16., 32., 64.]
    for strength in (ctl.default_strength, *ctl.strengths): assert ctl.resolve(strength) == strength["T"]
    assert all(isinstance(edit, Edit) and edit.remember is None for edit in ctl.edits(the_model(), None, ctl.default_strength).values())


# ---- generation

@pytest.mark.parametrize("kw", [dict(use_cache=False), dict(cache_implementation="static")], ids=str)
def test_greedy_is_the_same_with_and_without_cache(ctl, kw):
    ids = dict(input_ids=IDS, attention_mask=LEFT)
    plain = the_model().generate(**ids, **GREEDY)
    with ods.steering(the_model(), ctl, strength=1.5):
        with_cache = the_model().generate(**ids, **GREEDY)
        assert torch.equal(the_model().generate(**ids, **GREEDY, **kw), with_cache)
    assert not torch.equal(plain, with_cache)


def test_scores_are_those_of_generation(ctl):
    model, prompts = the_model(), ["ab", "the quick"]
    with ods.steering(model, ctl, strength=1.5):
        answers = generate_text(model, TOK, prompts, **GREEDY)
        ids = [TOK(p)["input_ids"] for p in prompts]
        out = [model.generate(input_ids=torch.tensor([i]), return_dict_in_generate=True, output_scores=True, **GREEDY) for i in ids]
        by_hand = torch.stack([sum(s[0].log_softmax(-1)[t] for s, t in zip(o.scores, o.sequences[0, len(i):])) for o, i in zip(out, ids)])
        if all(len(TOK(a, add_special_tokens=False)["input_ids"]) == 6 for a in answers): torch.testing.assert_close(score_continuations(model, TOK, prompts, answers), by_hand, rtol=1e-3, atol=1e-3)


def test_beams_and_return_sequences(ctl):
    ids, T = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS)), torch.tensor([0., 1., 2.])
    how = dict(num_beams=3, num_return_sequences=2, **GREEDY)
    with ods.steering(the_model(), ctl, strength=T): together = the_model().generate(**ids, **how)
    for i, t in enumerate(T.tolist()):
        with ods.steering(the_model(), ctl, strength=t): assert torch.equal(the_model().generate(input_ids=IDS[i:i + 1], attention_mask=torch.ones(1, 7), **how), together[2*i:2*i + 2])


# ---- dtypes, devices, compilers

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_precision_follows_the_activation_and_the_maths_is_float32_or_better(ctl, dtype):
    x = 3 * torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    narrow, edits = x.to(dtype), ctl.edits(the_model(dtype=dtype), None, 1.5)
    reference = ctl.edits(the_model(dtype=torch.float64), None, 1.5)
    for t in edits:
        out, exact = edits[t](narrow, narrow, ctl.resolve(1.5)), reference[t](narrow.double(), narrow.double(), ctl.resolve(1.5))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-4)
    out = steered(ctl, the_model(dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all() and not torch.equal(out, logits(the_model(dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_can_be_fitted_on(name, dtype):
    c = fit(name, the_model(dtype=dtype))
    assert all(v.dtype in (torch.float32, torch.float64) for k, v in c.state_dict().items() if v.is_floating_point())
    assert c.about["dtype"] == str(dtype).removeprefix("torch.") and steered(c, the_model(dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_was_prepared_is_what_is_done(ctl, dtype, monkeypatch):
    "Where all tokens are steered alike, against the long way round"
    model, long, edit, tol = the_model(dtype=dtype), [], Steering._edit, {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: .1}[dtype]
    monkeypatch.setattr(Steering, "_edit", lambda *args: long.append(args[1]) or edit(*args))
    with ods.steering(model, ctl, strength=1.5, positions="all") as handle:
        for strength in 1.5, -.5, 2.:
            handle.strength, before = strength, handle.applied
            quick = logits(model)
            assert not long and handle.applied - before == IDS.numel() * len(handle._at)
            with monkeypatch.context() as patched:
                patched.setattr(Steering, "_all_alike", lambda self, tokens: False)
                want = logits(model)
            assert len(long) == len(handle._at) and handle.applied - before == 2 * IDS.numel() * len(handle._at)
            torch.testing.assert_close(quick, want, rtol=tol, atol=tol)
            long.clear()
        handle.strength = torch.tensor([1.5, -.5, 2.])  # rows of their own are looked at one by one
        rows = logits(model)
        assert long
    torch.testing.assert_close(rows[2:], want[2:], rtol=tol, atol=tol)


def test_works_in_inference_mode_and_under_autocast(ctl):
    expected = steered(ctl)
    c = pickle.loads(pickle.dumps(ctl))  # has made no copies yet
    with torch.inference_mode(), ods.steering(the_model(), c, strength=1.5): assert torch.equal(the_model()(input_ids=IDS, use_cache=False).logits, expected)
    assert torch.equal(steered(c), expected)
    with torch.autocast("cpu", torch.bfloat16): assert steered(c).isfinite().all()


def test_gradients_flow_through(ctl):
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5), requires_grad=True)
    chain(ctl, x).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


def test_compiled_without_graph_breaks_or_stale_strength(ctl):
    model, graphs = copy.deepcopy(the_model()), []
    expected = {T: steered(ctl, strength=T) for T in (1., 2., 0., -1.)}
    plain = logits(model)
    def backend(graph, inputs): graphs.append(1); return graph
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    handle = ods.steering(model, ctl, strength=1.)
    logits(model), logits(model)
    made = len(graphs)
    for T in expected: handle.strength = T; torch.testing.assert_close(logits(model), expected[T])
    assert len(graphs) == made
    handle.remove()
    torch.testing.assert_close(logits(model), plain)


@pytest.mark.parametrize("arch", ["gpt2", "falcon", "gemma2", "mixtral", "opt"])
def test_architectures(name, arch):
    model = the_model(arch)
    c = fit(name, model)
    out, before = steered(c, model), logits(model)
    assert out.isfinite().all() and not torch.allclose(out[:, -1], before[:, -1]) and untouched(out[:, :-1], before[:, :-1], model)
    ids = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    with ods.steering(model, c, strength=1.5): assert torch.equal(model.generate(**ids, **GREEDY), model.generate(**ids, **GREEDY, use_cache=False))


# ---- nothing is carried over

def test_no_state_from_batch_to_batch(name):
    "Random batches, paddings, dtypes and strengths through one attachment, broken off now and then: each as if it were the first"
    rng, g, c = random.Random(0), torch.Generator().manual_seed(0), fit(name)
    pairs = {dtype: [tiny_model("llama", num_hidden_layers=LAYERS).to(dtype) for _ in "ab"] for dtype in DTYPES[1:]}
    old = {dtype: ods.steering(m, c) for dtype, (m, _) in pairs.items()}
    for _ in range(200 if name in ("alqr", "spid") else 100):
        dtype = rng.choice(DTYPES[1:])
        (worn, fresh), rows, n = pairs[dtype], rng.randint(1, 4), rng.randint(1, 9)
        ids, gap = torch.randint(4, VOCAB, (rows, n), generator=g), torch.randint(0, n, (rows, 1), generator=g)
        mask = (torch.arange(n) >= gap).long() if rng.random() < .5 else (torch.arange(n) < n - gap).long()
        old[dtype].strength = strength = rng.uniform(-1, 3) if rng.random() < .5 else torch.rand(rows, generator=g)
        with ods.steering(fresh, c, strength=strength): assert torch.equal(logits(worn, ids, mask), logits(fresh, ids, mask))
        if rng.random() < .1:
            trap = decoder_layers(worn)[rng.randrange(LAYERS)].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError): logits(worn, ids, mask)
            trap.remove()
    for h in old.values(): h.remove()


def test_no_state_from_token_to_token(ctl):
    "The edits of one pass, done twice, and with another token's pass between"
    x, edits, value = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(4)), ctl.edits(the_model(), None, 1.5), ctl.resolve(1.5)
    def one_pass(x):
        for t in range(LAYERS): x = edits[t](x, x + t, value) if t in edits else x + t
        return x
    first = [one_pass(row) for row in x]
    for i in (2, 0, 0, 1, 2): assert torch.equal(one_pass(x[i]), first[i])


@pytest.mark.parametrize("positions", ["last", "all"])
def test_threads_that_share_a_steering_do_not_mix(ctl, positions):
    "Two passes in step, block by block; what is carried from block to block belongs to its own"
    model, meet, both = the_model(), threading.Barrier(2), (IDS[:1], IDS[1:2].flip(1))
    def ends(ids): return logits(model, ids, None)
    with ods.steering(model, ctl, strength=1.5, positions=positions):
        want = [ends(ids) for ids in both]
        hooks = [block.register_forward_pre_hook(lambda *_: (meet.wait(30), None)[1]) for block in decoder_layers(model)]
        try:
            with ThreadPoolExecutor(2) as pool: got = list(pool.map(ends, both))
        finally:
            for h in hooks: h.remove()
    assert all(map(torch.equal, got, want)) and not torch.equal(*want)


# ---- bad input

BAD_FITS = {
    "no wanted texts": (lambda m: (m, TOK, [], NEG), ValueError, "pos_texts is empty"),
    "no unwanted texts": (lambda m: (m, TOK, POS, []), ValueError, "neg_texts is empty"),
    "a text": (lambda m: (m, TOK, "wanted", NEG), TypeError, "pos_texts must be a list of texts; got str: wrap a single text in [ ]"),
    "tensors": (lambda m: (m, TOK, torch.ones(3, WIDTH), NEG), TypeError, "text 0 must be a str"),
    "an empty text": (lambda m: (m, TOK, POS, [("a", "")]), ValueError, "has an empty answer"),
    "the same texts": (lambda m: (m, TOK, POS, POS), ValueError, "wanted and unwanted"),
}


@pytest.mark.parametrize("bad", BAD_FITS)
def test_bad_data(name, bad):
    change, error, message = BAD_FITS[bad]
    with pytest.raises(error, match=re.escape(message)): made(name).fit(*change(the_model()), progress=False)


def test_damaged_weights(name):
    model = copy.deepcopy(the_model())
    decoder_layers(model)[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"): fit(name, model)


def test_a_fit_that_fails_leaves_nothing_half_done(name, tmp_path):
    c = fit(name)
    with pytest.raises(ValueError): c.fit(the_model(), TOK, POS, [], progress=False)
    with pytest.raises(RuntimeError, match="not fitted"): steered(c)
    with pytest.raises(RuntimeError, match="not fitted"): c.save_pretrained(tmp_path)


def test_unfitted(name, tmp_path):
    c = made(name)
    for use in lambda: steered(c), lambda: c.edits(the_model(), None, 1.), lambda: c.resolve(1.), lambda: c.save_pretrained(tmp_path):
        with pytest.raises(RuntimeError, match="is not fitted: call .fit"): use()


def test_a_model_that_is_being_steered_is_not_fitted_on(name, ctl):
    with ods.steering(the_model(), ctl):
        with pytest.raises(ValueError, match="being steered"): fit(name)
        logits(the_model())


def test_another_model(ctl):
    with pytest.raises(ValueError, match=f"was fitted on {LAYERS} blocks, but LlamaForCausalLM has 2"): steered(ctl, tiny_model("llama", num_hidden_layers=2))
    with pytest.raises(ValueError, match=f"was fitted on activations of width {WIDTH}, but LlamaForCausalLM has width 16"): steered(ctl, tiny_model("llama", hidden_size=16))


@pytest.mark.parametrize("how, error, message", [
    (dict(layer=1), ValueError, "acts on all 4 blocks: leave out layer="),
    (dict(strength=None, share=.3), ValueError, "is a number (a set-point), not share"),
    (dict(strength=None, spread=1.), ValueError, "is a number (a set-point), not spread"),
    (dict(strength=dict(nats=1.)), ValueError, "is a number (a set-point), not nats"),
    (dict(strength=float("nan")), ValueError, "strength must be finite"),
    (dict(strength=torch.tensor([1., float("inf"), 1.])), ValueError, "strength must be finite"),
    (dict(strength=torch.ones(3, 2)), ValueError, "one value per row"),
    (dict(strength="strong"), TypeError, "strength"),
], ids=str)
def test_bad_steering(ctl, how, error, message):
    with pytest.raises(error, match=re.escape(message)): steered(ctl, **how)


def test_bad_settings(name):
    with pytest.raises(TypeError): ods.make_steerer(name, nonsense=1)
    for k, v in made(name).params.items():
        bad = "much" if isinstance(v, (int, float)) and not isinstance(v, bool) else None
        if k in ("q", "r", "qf", "kp", "ki", "kd", "reset_every", "steps"):
            with pytest.raises((TypeError, ValueError), match=k): ods.make_steerer(name, **{k: bad})
            with pytest.raises(ValueError, match=k): ods.make_steerer(name, **{k: float("nan")})
        if isinstance(v, str):
            with pytest.raises(ValueError, match=f"{k} must be .*; got 'nonsense'"): ods.make_steerer(name, **{k: "nonsense"})


# ---- files

def test_save_and_load(ctl, folder):
    assert sorted(f.name for f in folder.iterdir()) == ["card.json", "steerer.safetensors"]
    for load_it in ods.load_steerer, type(ctl).from_pretrained, ods.Controller.from_pretrained:
        again = load_it(folder)
        assert type(again) is type(ctl) and again.card == ctl.card and again.width == WIDTH and repr(again) == repr(ctl)
        assert again.state_dict().keys() == ctl.state_dict().keys()
        for k, v in ctl.state_dict().items(): assert torch.equal(again.state_dict()[k], v) and again.state_dict()[k].dtype == v.dtype
        for dtype in DTYPES: assert torch.equal(steered(again, the_model(dtype=dtype)), steered(ctl, the_model(dtype=dtype)))


def test_saved_twice_is_the_same_file(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("again")
    ods.load_steerer(folder).save_pretrained(other)
    for f in folder.iterdir(): assert f.read_bytes() == (other/f.name).read_bytes()


def test_a_loaded_controller_can_be_fitted_again(ctl, folder):
    again = ods.load_steerer(folder).fit(the_model(), TOK, POS, NEG, progress=False)
    assert torch.equal(steered(again), steered(ctl)) and again.card == ctl.card


def test_the_card_says_what_it_is(name, ctl):
    card = ctl.card
    assert card["method"] == name and card["params"] == ctl.params and card["width"] == WIDTH and card["unit"] == "fraction" and card["version"] == ods.__version__
    assert card["fit"]["n_pos"] == len(POS) and card["fit"]["n_neg"] == len(NEG) and card["fit"]["of"] == "texts" and re.fullmatch("[0-9a-f]{64}", card["fit"]["data_sha256"])
    assert json.loads(json.dumps(card)) == card and "layer" not in card["about"] and card["about"]["width"] == WIDTH


DAMAGE = {
    "one bit": (lambda f: (f/"steerer.safetensors").write_bytes(bytes([(b := (f/"steerer.safetensors").read_bytes())[0] ^ 1]) + b[1:]), "does not match its card"),
    "unknown method": (lambda f: rewrite(f, lambda c: {**c, "method": "os.system"}), "unknown method 'os.system'"),
    "the card of a steerer": (lambda f: rewrite(f, lambda c: {**c, "method": "caa", "params": {}}), "do not make a CAA"),
    "the settings of a steerer": (lambda f: rewrite(f, lambda c: {**c, "params": {"variant": "repe"}}), "do not make a"),
    "another width": (lambda f: rewrite(f, lambda c: {**c, "width": WIDTH + 1}), f"of width {WIDTH + 1}"),
    "missing tensors": (lambda f: rewrite(f, tensors=lambda t: {"median_norm_": t["median_norm_"]}), "do not make a"),
    "foreign tensors": (lambda f: rewrite(f, tensors=lambda t: {**t, "lora.A": torch.ones(2)}), "do not make a"),
    "a tensor named like a method": (lambda f: rewrite(f, tensors=lambda t: {**t, "edits": torch.ones(2)}), "do not make a"),
    "an edited setting": (lambda f: (f/"card.json").write_text((f/"card.json").read_text().replace('"seed": 0', '"seed": 1').replace('"r": ', '"r": 1')), "card.json is not as it was saved"),
    "an enormous width": (lambda f: rewrite(f, lambda c: {**c, "width": 10**12}), "no tensor is that wide"),
    "NaN": (lambda f: rewrite(f, tensors=lambda t: {**t, "median_norm_": t["median_norm_"] * float("nan")}), "median_norm_ holds NaN or infinity"),
    "blocks that are missing": (lambda f: rewrite(f, tensors=lambda t: {k: v[:1] if k != "median_norm_" and v.ndim else v for k, v in t.items()}), "do not make a"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(folder, damage):
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(ValueError, match=re.escape(message)): ods.load_steerer(folder)


@pytest.mark.parametrize("setting", ["steps", "reset_every", "n_texts", "n_jacobian", "max_tokens", "n_components", "batch_size"])
def test_loading_is_no_work_whatever_a_card_asks_for(ctl, setting, folder):
    if setting not in ctl.params: pytest.skip(f"has no {setting}")
    rewrite(folder, lambda c: {**c, "params": {**c["params"], setting: 10**12}})
    start = time.perf_counter()
    try: assert ods.load_steerer(folder).params[setting] == 10**12
    except ValueError as e: assert str(folder) in str(e)
    assert time.perf_counter() - start < 5


def test_files_of_the_other_kind(ctl, folder, tmp_path):
    with pytest.raises(ValueError, match=f"holds {type(ctl).__name__}, but Steerer was asked for"): ods.Steerer.from_pretrained(folder)
    ods.CAA().fit(torch.ones(3, WIDTH), torch.zeros(3, WIDTH)).save_pretrained(tmp_path/"caa")
    with pytest.raises(ValueError, match="holds CAA, but Controller was asked for"): ods.Controller.from_pretrained(tmp_path/"caa")


def test_copies_and_pickles(ctl):
    for twin in copy.deepcopy(ctl), pickle.loads(pickle.dumps(ctl)): assert torch.equal(steered(twin), steered(ctl))
    wide = copy.deepcopy(ctl).double()
    assert wide.median_norm_.dtype == torch.float64
    torch.testing.assert_close(steered(wide, the_model(dtype=torch.float64)), steered(ctl, the_model(dtype=torch.float64)), rtol=1e-5, atol=1e-5)


# ---- a model that has something to say

@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


def test_the_micro_model(name, lm):
    "Fitted on training facts: texts about other facts become more like wanted ones to a probe of the last block"
    train, val = lm.world.contrast("toxicity"), lm.world.contrast("toxicity", "val")
    c = made(name, **({"n_texts": 60} if "n_texts" in made(name).params else {})).fit(lm.model, lm.tokenizer, train.pos, train.neg, progress=False)
    read = lambda texts: ods.collect_activations(lm.model, lm.tokenizer, texts, layers=3, progress=False)[3]
    probe = ods.ITI().fit(read(train.pos[:100]), read(train.neg[:100]))
    with ods.steering(lm.model, c, strength=1.): moved = read(val.neg[:40])
    before, wanted = read(val.neg[:40]), read(val.pos[:40])
    score = lambda a: (a @ probe.coef_).mean()
    assert score(moved) > score(before) + .1 * (score(wanted) - score(before))
    prompts = [p.text for p in lm.world.prompts("toxicity", "val")[:6]]
    with ods.steering(lm.model, c, strength=1.): assert generate_text(lm.model, lm.tokenizer, prompts, **GREEDY) == [generate_text(lm.model, lm.tokenizer, [p], use_cache=False, **GREEDY)[0] for p in prompts]
