"Speed: what is timed is what it says, counts are right, the yardstick is the published recipe, and the whole table runs"
import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import odesteer as ods
from odesteer import speed
from odesteer.euler import Edit, Edits
from odesteer.models import decoder_layers
from odesteer.speed import (PARTS, TARGETS, Decoding, EmptyEdit, RecipeEdit, RoomEdit, activations, attached, count, fitted_methods,
                            goals, keep, measure, measure_answers, measure_collect, measure_decode, measure_fit, measure_hooks, measure_steer, objective,
                            pick, plain_collect, random_llama, recipe_flow, recipe_vjp, results, show, tables)
from odesteer.statistics import ratio, trials

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def llama(): return random_llama("tiny")


# The clock

def test_candidates_take_turns_and_are_compared_within_rounds():
    "With a clock that only the candidates move: exact times, one turn each per round, in changing order"
    now, calls = [0.], []
    def arm(name, takes):
        def f():
            calls.append(name)
            now[0] += takes
        return f
    arms = {name: arm(name, takes) for name, takes in dict(a=1., b=2., c=.25).items()}
    seconds = trials(arms, rounds=20, least=.5, clock=lambda: now[0])
    assert {k: set(v) for k, v in seconds.items()} == {"a": {1.}, "b": {2.}, "c": {.25}}
    warm, rest = calls[:-80], calls[-80:]
    assert warm.count("a") == warm.count("b") == 1 and warm.count("c") == 3  # a second of warm-up, or three calls
    turns = [rest[i:i + 4] for i in range(0, 80, 4)]  # c is called twice in a row: half a second
    assert all(sorted(t) == ["a", "b", "c", "c"] and "".join(t).count("cc") == 1 for t in turns)
    assert len(set(map(tuple, turns))) > 3
    r = ratio([2., 20., 2.2, 200., 4.], [1., 10., 1., 100., 1.])  # a slow minute that hits both changes nothing
    assert (r.value, r.lo, r.hi) == (2., 2., 2.2) and str(r) == "2 (2 to 2.2)"


# Counted work

def test_work_is_counted():
    a, B = torch.ones(3, 50), torch.ones(50, 70)
    w = count(lambda: a @ B)
    assert (w.kernels, w.flops, w.bytes) == (1, 2 * 3 * 50 * 70, 4 * (3 * 50 + 50 * 70 + 3 * 70))
    assert count(lambda: (a.T, a.view(50, 3)[:, 1:], a.expand(7, 3, 50))).kernels == 0  # views move nothing
    w = count(lambda: a + a.expand(7, 3, 50))
    assert (w.kernels, w.flops, w.bytes) == (1, 1050, 4 * (150 + 150 + 1050))  # what is repeated is read once
    x = torch.ones(4, 1024)
    z = x.to(torch.complex64)
    assert count(lambda: torch.fft.rfft(x)).flops == 2.5 * 4 * 1024 * 10 and count(lambda: torch.fft.fft(z)).flops == 5 * 4 * 1024 * 10
    assert count(lambda: torch.cat([x, x]).clone()).flops == 0
    assert count(lambda: torch.empty_like(x)) == speed.Work() and count(lambda: torch.zeros_like(x)).flops == 0  # room is no work
    assert count(lambda: torch.mul(x, x, out=torch.empty_like(x))) == count(lambda: x * x)
    table = torch.ones(10_000, 8)
    assert count(lambda: table[torch.tensor([1, 2])]).bytes < 1000 and count(lambda: torch.nn.functional.embedding(torch.tensor([1, 2]), table)).bytes < 1000


@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_a_token_reads_every_weight_once(shape):
    model = random_llama(shape, "meta", torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) - (0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel())
    one, many = (Decoding(model, prompt=16, batch=b).count() for b in (1, 8))
    assert 1 < one.flops / (2 * weights) < 1.02 and 1 < one.bytes / (2 * weights) < 1.05
    assert 7.9 < many.flops / one.flops < 8.1 and many.bytes < 1.2 * one.bytes


def test_the_shapes_are_those_of_the_models():
    found = {s: sum(p.numel() for p in random_llama(s, "meta").parameters()) for s in ("1b", "8b")}
    assert found == {"1b": 1_235_814_400, "8b": 8_030_261_248}


# The yardstick

@pytest.mark.parametrize("degree, coef0", [(1, 1.), (2, 1.), (3, .5), (2, 0.)])
def test_the_recipe_is_the_gradient_of_the_score(degree, coef0):
    "Against autograd, in float64"
    g = torch.Generator().manual_seed(degree)
    sketch = ods.PolynomialCountSketch(60, degree, .3, coef0).fit(torch.zeros(1, 9))
    x, w = torch.randn(5, 9, generator=g, dtype=torch.float64).requires_grad_(), torch.randn(60, generator=g, dtype=torch.float64)
    expected, = torch.autograd.grad((sketch(x) @ w).sum(), x)
    torch.testing.assert_close(recipe_vjp(x.detach(), w, sketch.indexHash_, sketch.bitHash_.double(), .3, coef0, 60), expected)


@pytest.mark.parametrize("degree", [2, 3])
def test_the_recipe_is_odesteer(degree):
    pos, neg = (x.double() for x in activations(40, 12))
    s = ods.ODESteer(n_components=200, degree=degree, steps=7).fit(pos, neg)
    torch.testing.assert_close(recipe_flow(neg, 2., **tables(s), steps=7), s.steer(neg, 2.), rtol=1e-7, atol=1e-7)


# Tokens

def test_decoding_says_what_generate_says(llama):
    prompt = torch.arange(4, 20)[None]
    expected = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 16:].tolist()
    for static in (False, True):
        decoding, answer = Decoding(llama, prompt=16, room=16, static=static), []
        for i in range(6):
            answer.append(decoding.token.item())
            if i == 2: assert decoding.count().kernels > 50  # a step that is counted is forgotten
            decoding.step()
        assert answer == expected or static and answer[:3] == expected[:3]


class Made(TorchDispatchMode):
    "Counts tensors in memory of their own"
    n = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in [*args, *(kwargs or {}).values()] if isinstance(x, torch.Tensor)}
        self.n += out.untyped_storage().data_ptr() not in given
        return out


def test_alqr_in_room_made_beforehand_makes_nothing_but_the_result():
    lm = ods.load_micro()
    truth = lm.world.contrast("truth")
    alqr = ods.ALQR(jacobian="identity").fit(lm.model, lm.tokenizer, truth.pos[:8], truth.neg[:8], progress=False)
    x, y = torch.randn(2, 3, 1, alqr.width, generator=torch.Generator().manual_seed(0))
    ours, trial = (part.edits(lm.model, None, 1.)[1].prepare(torch.ones(())) for part in (alqr, RoomEdit(alqr)))
    assert torch.equal(ours(x, y), trial(x, y)) and isinstance(RoomEdit(alqr), Edits)
    with Made() as made: trial(x, y)
    assert made.n == 1
    with Made() as made: ours(x, y)
    assert made.n == 4


def test_controls_and_the_recipe_in_a_hook(llama):
    ids = torch.arange(4, 20)[None]
    def logits():
        with torch.no_grad(): return llama(ids).logits
    before, s = logits(), ods.ODESteer(n_components=300).fit(*activations(40, 64))
    with attached(llama, (EmptyEdit(), None), 2): assert torch.equal(logits(), before)
    with attached(llama, (s, None), 2): ours = logits()
    with attached(llama, (RecipeEdit(s), None), 2): theirs = logits()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert isinstance(EmptyEdit(), Edits) and isinstance(RecipeEdit(s), Edits)
    with attached(llama, None, 2): assert torch.equal(logits(), before)


def test_every_method_is_measured(llama):
    lm = ods.load_micro()
    truth = lm.world.contrast("truth")
    methods = fitted_methods(lm.model, lm.tokenizer, n_components=100, texts=(truth.pos[:8], truth.neg[:8]))
    assert set(methods) == {*ods.steerer_names("steerer"), *ods.steerer_names("controller")}
    assert all(m.width == 128 for m, _ in methods.values()) and methods["barrier-lqr"][0].K_.shape[-2:] == (128, 128)
    rows = measure_decode(lm.model, methods, rounds=1, prompt=8)
    work = {r["method"]: r["kernels"] for r in rows}
    assert work["unsteered"] == work["unsteered again"] == work["empty edit"] < min(work[m] for m in methods)
    assert all(r["seconds"] > 0 and r["ratio"][1] <= r["ratio"][0] <= r["ratio"][2] for r in rows)
    assert "generate" not in vars(lm.model) and not any(m._forward_hooks for m in lm.model.modules())


def test_a_clock_that_stands_still_while_blocks_compute(llama, monkeypatch):
    "By hand: a block takes 10 seconds, an edit one"
    now = [0.]
    def wait(seconds): now[0] += seconds
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    class Late(EmptyEdit):
        def edits(self, model, layer, strength): return {layer: Edit(lambda x, y, value: wait(1) or y)}
    class Evicts(EmptyEdit):  # and the next block takes a hundred seconds
        def edits(self, model, layer, strength): return {layer: Edit(lambda x, y, value: slow.append(100) or y)}
    stack, slow = decoder_layers(llama), []
    hooks = [block.mlp.register_forward_pre_hook(lambda *_: wait(slow.pop() if slow else 10)) for block in stack]
    rows = measure_hooks(llama, {"evicts": (Evicts(), None), "late": (Late(), None)}, "toy", rounds=2, prompt=8)
    for h in hooks: h.remove()
    token = 10 * len(stack)
    assert [(r["method"], r["seconds"], r["token"]) for r in rows] == [("unsteered", 0, token), ("unsteered again", 0, token), ("empty edit", 0, token), ("evicts", 0, token), ("late", 1, token)]
    assert rows[-1]["ratio"] == [1 + 1/token] * 3 and not any("forward" in vars(m) or m._forward_hooks for m in llama.modules())


def test_compiled_decoding(llama):
    "The arm of a GPU, with a compiler that changes nothing"
    compiled = []
    def backend(graph, inputs): compiled.append(1); return graph
    rows = measure_decode(llama, {"caa": (ods.CAA().fit(*activations(8, 64)), None)}, rounds=1, prompt=8, static=True, compiled=dict(backend=backend))
    assert [r["method"] for r in rows] == ["unsteered", "unsteered again", "empty edit", "caa"] and all(r["compiled"] and r["static"] for r in rows) and compiled


# Before

def test_the_plain_loop_collects_the_same():
    lm = ods.load_micro()
    texts = lm.world.contrast("truth").neg[:9]
    expected = ods.collect_activations(lm.model, lm.tokenizer, texts, layers=[0, 2], progress=False)
    for layer, a in expected.items(): torch.testing.assert_close(plain_collect(lm.model, lm.tokenizer, texts, layer, 4), a, rtol=1e-4, atol=1e-4)
    rows = measure_collect(lm.model, lm.tokenizer, texts, rounds=1)
    assert [r["layer"] for r in rows] == ["plain", 0, 1, 2, 3] and all(r["error"] < 1e-4 for r in rows)


def test_the_objective_is_that_of_the_regression():
    pos, neg = activations(15, 6)
    b = ods.DensityRatioBarrier(ods.PolynomialCountSketch(40), C=.5).fit(pos, neg)
    Z, y = b.phi(torch.cat([pos, neg])).double().numpy(), np.repeat([1, -1], 15)
    w, c = b.coef_.double().numpy(), float(b.intercept_)
    expected = np.log1p(np.exp(-y * (Z @ w + c))).sum() + (w @ w) / (2 * .5)
    assert math.isclose(objective(b, torch.cat([pos, neg]), np.repeat([1, 0], 15), w, c), expected, rel_tol=1e-9)
    rows = {r["solver"]: r for r in measure_fit(60, 8, 50, rounds=1)}
    assert rows["ours"]["objective"] <= rows["scikit-learn"]["objective"] * (1 + 1e-6)


def test_answers_to_many_prompts_are_those_of_the_plain_loop():
    "Drawn or not, batch by batch; and the global random state is left alone"
    lm, state = ods.load_micro(), torch.random.get_rng_state()
    asked = lm.world.contrast("truth").neg[:10]
    rows = measure_answers(lm.model, lm.tokenizer, asked, tokens=3, rounds=1)
    assert [(r["draws"], r["way"]) for r in rows] == [(d, w) for d in speed.DRAWS for w in ("plain loop", "sample")]
    assert all(r["same"] == 1 and r["batch"] == 8 and r["prompts"] == 10 for r in rows) and torch.equal(torch.random.get_rng_state(), state)
    drawn = {name: speed.plain_answers(lm.model, lm.tokenizer, asked, 8, max_new_tokens=3, **draws) for name, draws in speed.DRAWS.items()}
    assert all(len(a) == 10 for a in drawn.values()) and drawn["greedy"] != drawn["T = 1"]
    assert drawn["greedy"] == ods.generate_text(lm.model, lm.tokenizer, asked, 8, max_new_tokens=3, do_sample=False)


# All of it

@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")/"speed.json"
    return measure(tiny=True, rounds=1, out=out, log=lambda line: None), out


def test_the_whole_table_at_tiny_sizes(found):
    found, out = found
    assert set(found) == {"machine", *PARTS} and all(found[p] for p in PARTS)
    for part in PARTS:
        for r in found[part]: assert r["seconds"] > 0 and 0 < r["ratio"][1] <= r["ratio"][0] <= r["ratio"][2] < math.inf, r
    assert {(r["width"], r["batch"], r["steps"], r["route"]) for r in found["steer"]} == {(d, b, n, m) for d in (16, 32) for b in (1, 2) for n in (1, 2) for m in ("recipe", *speed.ROUTES, speed.LOW)}
    assert all(r["error"] < (1 if r.get("route") == speed.LOW else 1e-4) for r in found["steer"] + found["collect"])
    assert {r["took"] for r in found["steer"] if r["route"] == speed.LOW} == {"spectral"}
    assert all({r["shape"] for r in found[part]} == {"micro", "tiny"} for part in ("decode", "collect", "controller", "answer"))
    fit, read = ([r["seconds"] for r in found["controller"] if r["what"] == what] for what in ("fit", "reading"))
    assert all(f > r for f, r in zip(fit, read)) and all(r["same"] == 1 for r in found["answer"])
    text = show(found)
    assert all(f"\n{part}\n" in text for part in PARTS) and "published recipe" in text and len(text.splitlines()) > 60


def test_results_are_kept_part_by_part(found, tmp_path):
    whole, out = found
    kept = json.loads(out.read_text())
    assert {k: len(v) for k, v in kept.items()} == {k: len(v) for k, v in whole.items()}
    assert show(kept).count("\n") == show(whole).count("\n")
    keep({"machine": kept["machine"], "import": []}, out)
    assert json.loads(out.read_text()) == kept | {"import": []}


def test_results_of_two_machines_are_not_mixed(found, tmp_path):
    kept, out = json.loads(found[1].read_text()), tmp_path/"speed.json"
    keep({"machine": kept["machine"]}, out)
    keep({"machine": kept["machine"] | {"flops": 1., "bandwidth": 2.}, "import": []}, out)  # these vary
    assert json.loads(out.read_text())["machine"] == kept["machine"]  # the rates are those of what they are compared with
    keep({"machine": kept["machine"] | {"flops": 1.}, "steer": []}, out)
    before = out.read_text()
    assert json.loads(before)["machine"]["flops"] == 1
    for other in {"name": "another"}, {"threads": 64}, {"sizes": "full"}:
        with pytest.raises(ValueError, match="results of another run"): keep({"machine": kept["machine"] | other, "fit": []}, out)
    assert out.read_text() == before
    for broken in "[1]", "{", '{"fit": []}':
        out.write_text(broken)
        with pytest.raises(ValueError, match="is no file of"): keep({"machine": kept["machine"]}, out)


def test_parts_that_are_kept_at_once_are_all_there(found, tmp_path):
    kept, out = json.loads(found[1].read_text()), tmp_path/"speed.json"
    with ThreadPoolExecutor(6) as pool: list(pool.map(lambda i: keep({"machine": kept["machine"], f"part {i}": []}, out), range(12)))
    assert json.loads(out.read_text()).keys() == {"machine", *(f"part {i}" for i in range(12))} and [p.name for p in tmp_path.iterdir()] == ["speed.json"]


def test_what_cannot_be_measured_is_refused_first(tmp_path):
    for kw, message in ((dict(parts="speed"), "parts must be some of"), (dict(parts=()), "got none"),
                        (dict(device="banana"), "device must be"), (dict(device="meta"), "device must be")):
        with pytest.raises(ValueError, match=message): measure(tiny=True, **kw)
    for out in tmp_path, tmp_path/"none"/"x.json":
        with pytest.raises(FileNotFoundError, match="cannot be written"): measure("steer", tiny=True, out=out, log=lambda line: pytest.fail("measured all the same"))


def test_the_committed_results_hold_every_row_that_the_page_reads():
    kept = results()
    assert set(kept) == {"machine", *PARTS}
    assert all(len(pick(part, **where)) == 1 for _, _, part, *wheres in TARGETS.values() for where in wheres) and len(goals(kept).splitlines()) == len(TARGETS)
    names = {r["method"] for r in pick("decode", shape="1b")}
    assert names >= {*ods.steerer_names("steerer"), *ods.steerer_names("controller"), "unsteered again", "empty edit", "published recipe"}
    for part in PARTS:
        for r in kept[part]: assert r["seconds"] > 0 and r["ratio"][1] <= r["ratio"][0] <= r["ratio"][2]


@gpu
def test_on_a_gpu():
    rows = measure_steer(256, (1, 4), (10,), 1000, device="cuda", rounds=2)
    assert all(r["error"] < 1e-3 for r in rows if r["route"] != speed.LOW)
    model = random_llama("tiny", "cuda", torch.bfloat16)
    methods = fitted_methods(model, names=ods.steerer_names("steerer"), n_components=500)
    for how in (dict(), dict(static=True), dict(static=True, compiled=dict(mode="reduce-overhead"))): assert len(measure_decode(model, methods, rounds=1, prompt=8, **how)) == 3 + len(methods)
