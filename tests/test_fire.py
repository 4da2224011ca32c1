"Under fire: injected failures, kills at random moments, writers on one folder, a disk that is full, damaged files, extreme numbers, any input. What was tried is counted and printed"
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import odesteer as ods
from odesteer.hooks import generate_text, score_continuations, steering
from odesteer.models import collect_activations, decoder_layers, is_steered
from odesteer.sweeps import Search, benchmark

from .archs import LAYERS, WIDTH, tiny_model, tiny_tokenizer
from .benches import bench, contents
from .test_calls import clean
from .test_models import GREEDY, IDS, LEFT, MASK, logits, the_model

FORK = "fork" in multiprocessing.get_all_start_methods()
needs_fork = pytest.mark.skipif(not FORK, reason="no fork here")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


@pytest.fixture(scope="session")
def tok(): return tiny_tokenizer()

@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


def clouds(n=40, d=WIDTH, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g) + .5).to(dtype), torch.randn(n, d, generator=g).to(dtype)

def fitted(name, pos=None, neg=None, **kw):
    if pos is None: pos, neg = clouds()
    kw = dict(n_components=64) | kw if "odesteer" in name else kw
    if name in ("truthflow", "recontrol"): kw = dict(epochs=2) | kw
    source = dict(source=neg[:len(pos)]) if "source" in getattr(ods.euler.load_class(name), "wants", ()) else {}
    return ods.make_steerer(name, **kw).fit(pos, neg, **source)

NAMES = [*ods.steerer_names(), *ods.steerer_names("placebo")]


# ---- a thousand failures

def test_a_thousand_failures_leave_no_hook(tok, report):
    "Anything may fail, anywhere in a call: in a block, in what steers, in a processor, in the tokenizer, by Ctrl-C"
    rng, steerers = random.Random(0), [fitted(name) for name in ("caa", "odesteer", "linact")]
    models = [the_model(arch) for arch in ("llama", "gpt2", "qwen3", "mamba")]
    before = [logits(m) for m in models]
    errors = [ZeroDivisionError, KeyboardInterrupt, MemoryError, RuntimeError]
    raised = 0
    for _ in range(1000):
        model, steerer, error, layer, after = rng.choice(models), rng.choice(steerers), rng.choice(errors), rng.randrange(LAYERS), rng.randrange(4)
        countdown = [after]
        def fail(*args, **kw):
            countdown[0] -= 1
            if countdown[0] < 0: raise error("injected")
        class Processor:
            def __call__(self, ids, scores): fail(); return scores
        class Bad:
            def edits(self, model, layer, strength): return {layer: lambda x, y, T: fail() or y}
        kind, trap = rng.choice(["block", "edit", "processor", "body", "tokenizer", "collect", "score"]), None
        if kind in ("block", "collect", "score"): trap = decoder_layers(model)[rng.randrange(LAYERS)].register_forward_hook(fail)
        what = {layer: steerer} if kind != "edit" else {layer: Bad(), (layer + 1) % LAYERS: steerer}
        try:
            with steering(model, what, T=.5):
                if kind == "processor": model.generate(input_ids=IDS, attention_mask=LEFT, **GREEDY, logits_processor=[Processor()])
                elif kind == "body": logits(model); raise error
                elif kind == "tokenizer": generate_text(model, lambda *a, **k: 1 / 0, ["hi"])
                elif kind == "collect": [collect_activations(model, tok, ["hi you", "who?"], batch_size=1, progress=False) for _ in range(4)]
                elif kind == "score": [score_continuations(model, tok, ["q"], [" me"]) for _ in range(8)]
                else: [model.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **GREEDY) for _ in range(2)]
        except tuple(errors): raised += 1
        finally:
            if trap: trap.remove()
    left = sum(not clean(m) for m in models)
    report(f"{raised} of 1000 calls failed as told, {left} models with a hook left")
    assert raised == 1000 and left == 0 and not any(is_steered(m) for m in models)
    assert all(torch.equal(logits(m), b) for m, b in zip(models, before))


# ---- kills

def benchmarked(lm, out):
    benchmark(bench(lm, out), ["caa", "random"], Search([1, 2], [{"share": .2}, {"share": .4}], refine=1, repeats=1, seeds=1))

def in_child(f, *args):
    "A forked process that does this and says how it ended"
    def child():
        for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try: f(*args)
        except OSError: os._exit(5)
        except BaseException: os._exit(6)
        os._exit(0)
    p = multiprocessing.get_context("fork").Process(target=child)
    p.start()
    return p

def choices(out): return {p.name: json.loads(p.read_text()) for p in sorted((out/"choices").glob("*.json"))}

@needs_fork
def test_killed_at_twenty_moments_it_ends_like_an_undisturbed_run(lm, tmp_path, report):
    began = time.monotonic()
    benchmarked(lm, tmp_path/"whole")
    seconds, rng, kills, folder = time.monotonic() - began, random.Random(1), [], 0
    while len(kills) < 20 or not folder:  # the last kill may come when all is done
        out = tmp_path/f"killed {folder}"
        p = in_child(benchmarked, lm, out)
        p.join(rng.uniform(0, seconds / 8) if len(kills) < 20 else 300)
        if p.exitcode is None:
            kills.append(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            os.kill(p.pid, kills[-1])
            p.join(60)
            continue
        assert p.exitcode == 0 and contents(out) == contents(tmp_path/"whole") and choices(out) == choices(tmp_path/"whole")
        folder += 1  # it got through between two kills: begin another
    report(f"{folder} benchmarks killed {len(kills)} times ({kills.count(signal.SIGKILL)} SIGKILL, {kills.count(signal.SIGTERM)} SIGTERM, {kills.count(signal.SIGINT)} SIGINT), with the results of an undisturbed one")
    assert len(kills) == 20 and folder >= 1


@needs_fork
def test_several_writers_on_one_folder(lm, tmp_path):
    benchmarked(lm, tmp_path/"whole")
    together = [in_child(benchmarked, lm, tmp_path/"shared") for _ in range(4)]
    for p in together: p.join(300)
    assert [p.exitcode for p in together] == [0]*4
    assert contents(tmp_path/"shared") == contents(tmp_path/"whole") and choices(tmp_path/"shared") == choices(tmp_path/"whole")
    assert not [*(tmp_path/"shared").rglob("*.part*"), *(tmp_path/"shared").rglob("lock")]


@needs_fork
def test_a_disk_that_is_full(lm, tmp_path):
    "No file can grow beyond some size: the run stops with the system's error, and goes on once there is room"
    def cramped(out, size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        benchmarked(lm, out)
    benchmarked(lm, tmp_path/"whole")
    codes = []
    for size in (10, 200, 600, 1500, 4000):
        p = in_child(cramped, tmp_path/"full", size)
        p.join(300)
        codes.append(p.exitcode)
    assert codes[:3] == [5]*3 and set(codes) <= {0, 5}, codes
    benchmarked(lm, tmp_path/"full")
    assert contents(tmp_path/"full") == contents(tmp_path/"whole") and choices(tmp_path/"full") == choices(tmp_path/"whole")


def test_a_folder_that_cannot_be_written(lm, tmp_path):
    (tmp_path/"file").write_text("no folder")
    with pytest.raises(OSError, match="file"): bench(lm, tmp_path/"file"/"runs").run()
    with pytest.raises(OSError, match="file"): fitted("caa").save_pretrained(tmp_path/"file"/"s")


# ---- damaged files

@pytest.mark.parametrize("name", ["caa", "odesteer", "linact", "hpr", "truthflow"])
def test_damage_is_found_or_does_no_harm(name, tmp_path, report):
    "Bits flipped, bytes lost or added, files cut or emptied: one clear error, or the very same steerer"
    rng, steerer, a = random.Random(name), fitted(name), clouds(seed=5)[1]
    steerer.save_pretrained(tmp_path/"whole")
    want, refused = steerer.steer(a, T=.7), 0
    for k in range(60):
        shutil.copytree(tmp_path/"whole", tmp_path/"s", dirs_exist_ok=True)
        file = tmp_path/"s"/rng.choice(["card.json", "steerer.safetensors"])
        data = bytearray(file.read_bytes())
        how, at = rng.choice(["flip", "cut", "drop", "add", "empty", "zero"]), rng.randrange(len(data))
        if how == "flip": data[at] ^= 1 << rng.randrange(8)
        elif how == "cut": del data[at:]
        elif how == "drop": del data[at]
        elif how == "add": data.insert(at, rng.randrange(256))
        elif how == "empty": data.clear()
        else: data[at:at + 16] = bytes(len(data[at:at + 16]))
        file.write_bytes(data)
        try: again = ods.load_steerer(tmp_path/"s")
        except (ValueError, OSError) as e:
            assert len(str(e)) > 20 and str(tmp_path) in str(e)
            refused += 1
            continue
        assert torch.equal(again.steer(a, T=.7), want), (how, at, file.name)
    report(f"{name}: {refused} of 60 damaged folders refused, the others are the same steerer")
    assert refused > 30


# ---- extreme numbers

def extremes():
    pos, neg = clouds()
    yield "huge", pos * 1e30, neg * 1e30
    yield "tiny", pos * 1e-30, neg * 1e-30
    yield "far from zero", pos + 1e6, neg + 1e6
    yield "zero rows", torch.cat([pos, torch.zeros(3, WIDTH)]), torch.cat([neg, torch.zeros(3, WIDTH)])
    yield "perfectly separated", pos + 100, neg - 100
    yield "the same", pos, pos.clone()
    yield "one outlier coordinate", *(torch.cat([x[:, :1] * 1e5, x[:, 1:]], 1) for x in (pos, neg))
    yield "constant coordinates", *(torch.cat([torch.ones(len(x), 5), x[:, 5:]], 1) for x in (pos, neg))
    yield "one direction", *(x[:, :1] * torch.ones(1, WIDTH) for x in (pos, neg))
    yield "two rows each", pos[:2], neg[:2]

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_extreme_activations_and_strengths(name, report):
    "A finite result or one clear error, never NaN"
    tried = refused = 0
    for what, pos, neg in extremes():
        try: steerer = fitted(name, pos, neg)
        except (ValueError, RuntimeError) as e:
            assert len(str(e)) > 20, (what, e)
            refused += 1
            continue
        for rows in (neg[:3], torch.zeros(2, WIDTH), neg[:3] * 1e3, *(clouds(seed=7)[1][:3] * scale for scale in (1, 1e15, 1e-30))):
            for strength in ({"T": 0.}, {"T": 1.}, {"T": 1e6}, {"T": -1e6}, {"share": .5}, {"share": 1e3}):
                tried += 1
                try: moved = steerer.steer(rows, **strength)
                except ValueError as e:
                    assert len(str(e)) > 20, (what, strength, e)
                    refused += 1
                    continue
                assert moved.isfinite().all() and moved.shape == rows.shape, (what, strength)
                if strength == {"T": 0.}: assert torch.equal(moved, rows), what
    report(f"{name}: {tried} extreme calls, {refused} refused, none gave NaN")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_great_strengths_on_a_pretrained_model(smollm2, dtype):
    import copy
    model, tok = copy.deepcopy(smollm2[0]).to(dtype), smollm2[1]
    wanted, unwanted = ["What a lovely day", "I love this film", "Good food, kind people"], ["What an awful day", "I hate this film", "Bad food, rude people"]
    read = lambda texts: collect_activations(model, tok, texts, layers=14, progress=False)[14]
    steerer = ods.CAA().fit(read(wanted), read(unwanted))
    for T in (1., 1e3, 3e4, 1e6, 1e30):
        try:
            with steering(model, steerer, layer=14, T=T), torch.no_grad():
                assert model(**tok("How was it?", return_tensors="pt")).logits.isfinite().all(), T
        except ValueError as e: assert dtype == torch.float16 and T >= 3e4 and "float16" in str(e), (T, e)


@needs_fork
def test_one_and_two_threads_say_the_same(tmp_path):
    def work(threads, file):
        torch.set_num_threads(threads)
        pos, neg = clouds(200, 64)
        out = {}
        for name in ("caa", "odesteer", "linact", "mimic"):
            steerer = fitted(name, pos, neg)
            out[name] = steerer.steer(neg, T=1.)
        torch.save(out, file)
    for n in (1, 2):
        p = multiprocessing.get_context("fork").Process(target=work, args=(n, tmp_path/f"{n}.pt"))
        p.start()
        p.join(120)
        assert p.exitcode == 0
    one, two = (torch.load(tmp_path/f"{n}.pt", weights_only=True) for n in (1, 2))
    for name in one: torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


# ---- what held stays

def test_a_model_changes_precision_while_it_is_steered():
    model, steerer = tiny_model("llama", seed=9), fitted("odesteer")
    with steering(model, steerer, layer=1, T=1.):
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            model.to(dtype)
            assert logits(model).isfinite().all() and logits(model).dtype == dtype
    assert clean(model)


# ---- any input

numbers = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-10**30, 10**30), st.none(), st.booleans(), st.text(max_size=3),
                    st.lists(st.floats(-5, 5), max_size=4), st.just(torch.tensor([1., 2., 3.])), st.just(torch.tensor(float("nan"))))
COUNT = {"strengths": 0, "tensors": 0, "texts": 0}

@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(strength=numbers, layer=st.one_of(st.integers(-9, 9), st.floats(), st.none(), st.text(max_size=2)), unit=st.sampled_from(["strength", "T", "share", "spread", "nats", "until", "force"]),
       positions=st.one_of(st.sampled_from(["last", "all", "first", 0, None]), st.lists(st.integers(-3, 9), max_size=4)))
@pytest.mark.filterwarnings("ignore")
def test_any_strength_layer_and_position(strength, layer, unit, positions):
    "Steering gives finite logits or one of three errors, and leaves nothing behind"
    model = the_model("llama")
    COUNT["strengths"] += 1
    try:
        with steering(model, FUZZED, layer=layer, positions=positions, **{unit: strength}): out = logits(model)
        assert out.isfinite().all()
    except (TypeError, ValueError, RuntimeError) as e: assert len(str(e)) > 10
    assert clean(model) and not is_steered(model)

shapes = st.lists(st.integers(0, 4), max_size=3)

@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes=st.tuples(shapes, shapes), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]),
       fill=st.sampled_from([0., 1., -1e30, float("nan"), float("inf"), None]), name=st.sampled_from(NAMES))
@pytest.mark.filterwarnings("ignore")
def test_any_tensors_are_fitted_or_refused(shapes, dtype, fill, name):
    COUNT["tensors"] += 1
    g = torch.Generator().manual_seed(0)
    make = lambda s: (torch.randn(s, generator=g) if fill is None else torch.full(s, fill)).to(dtype)
    try: pos, neg = map(make, shapes)
    except (RuntimeError, OverflowError): return  # PyTorch itself cannot make them
    try: steerer = ods.make_steerer(name, **(dict(n_components=16) if "odesteer" in name else {})).fit(pos, neg)
    except (TypeError, ValueError, RuntimeError) as e: assert len(str(e)) > 10
    else: assert steerer.steer(neg.float(), T=.5).isfinite().all()

@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.one_of(st.text(max_size=12), st.none(), st.integers(), st.binary(max_size=3), st.tuples(st.text(max_size=4), st.text(max_size=4)),
                                st.lists(st.fixed_dictionaries(dict(role=st.sampled_from(["user", "assistant", "system", ""]), content=st.text(max_size=4))), max_size=3)), max_size=3))
def test_any_texts_are_read_or_refused(texts):
    COUNT["texts"] += 1
    try: acts = collect_activations(the_model("llama"), tiny_tokenizer(), texts, layers=1, progress=False)[1]
    except (TypeError, ValueError) as e: assert len(str(e)) > 10
    else: assert acts.shape == (len(texts), WIDTH) and acts.isfinite().all()

def test_how_much_was_tried(report):
    report("fuzzed: " + ", ".join(f"{n} {what}" for what, n in COUNT.items()))

FUZZED = fitted("odesteer")
