"Any model: blocks found, activations read and steered at exactly the chosen tokens, on 25 architectures"
import collections
import copy
import threading
import warnings

import pytest
import torch
import transformers
from torch import nn

import odesteer as ods
from odesteer.euler import Edit
from odesteer.hooks import generate_text, score_continuations, steered_positions, steering
from odesteer.models import (
    Encoded, collect_activations, decoder_layers, describe_site, encode, fingerprint, is_steered, padded)

from .archs import CONFIGS, LAYERS, VOCAB, WIDTH, tiny_model, tiny_tokenizer, untouched

LAYER = 1
MODELS = {}


def the_model(arch):
    "One model per architecture and session; every test leaves it as it was"
    if arch not in MODELS: MODELS[arch] = tiny_model(arch)
    return MODELS[arch]


@pytest.fixture(params=CONFIGS)
def model(request): return the_model(request.param)


@pytest.fixture
def llama(): return the_model("llama")


@pytest.fixture(scope="session")
def tok(): return tiny_tokenizer()


class Twist:
    "A test steerer: a nonlinear move, so that steering a token twice or never shows"
    def __init__(self, seed=0): self.v, self.W = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for shape in ((WIDTH,), (WIDTH, WIDTH)))
    def move(self, y, T): return torch.where((T != 0)[..., None], (y.float() + T[..., None] * (self.v + torch.tanh(y.float() @ self.W))).to(y.dtype), y)
    def edits(self, model, layer, strength): return {layer: lambda x, y, T: self.move(y, T)}


TWIST = Twist()
IDS = torch.randint(4, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
GREEDY = dict(max_new_tokens=6, do_sample=False)


def logits(model, ids=IDS, mask=MASK):
    with torch.no_grad(): return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def block_output(model, layer=LAYER, ids=IDS, mask=MASK, **kw):
    "What a hook set last sees of a block"
    seen = []
    hook = decoder_layers(model)[layer].register_forward_hook(lambda m, a, out: seen.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad(): model(input_ids=ids, attention_mask=mask, **(kw or {"use_cache": False}))
    hook.remove()
    return seen[0]


def reference_greedy(model, ids, twist=TWIST, T=1., n=6, layer=LAYER):
    "One prompt without padding or cache, one token at a time; a hook of our own steers every position from the last prompt token on"
    q = len(ids)
    def hook(m, a, out):
        y = out if torch.is_tensor(out) else out[0]
        y = torch.cat([y[:, :q - 1], twist.move(y[:, q - 1:], torch.tensor(T))], 1)
        return y if torch.is_tensor(out) else (y, *out[1:])
    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    ids = ids[None]
    for _ in range(n): ids = torch.cat([ids, logits(model, ids, torch.ones_like(ids))[:, -1:].argmax(-1)], 1)
    handle.remove()
    return ids[0, q:]


def hooks(model): return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


# 25 architectures

def test_blocks_are_found(model): assert len(decoder_layers(model)) == LAYERS


@pytest.mark.parametrize("mask", [MASK, LEFT, RIGHT], ids=["full", "left", "right"])
def test_a_forward_steers_exactly_the_last_real_token(model, mask):
    before = block_output(model, mask=mask)
    with steering(model, TWIST, layer=LAYER, T=1.) as h: after = block_output(model, mask=mask)
    last = (mask * torch.arange(7)).argmax(1)
    expected = before.clone()
    expected[range(3), last] = TWIST.move(before[range(3), last], torch.ones(()))
    assert torch.equal(after, expected) and h.applied == 3
    assert not torch.equal(after, before)


def test_all_positions_and_prompt_lengths(model):
    before = block_output(model, mask=LEFT)
    with steering(model, TWIST, layer=LAYER, T=1., positions="all") as h: after = block_output(model, mask=LEFT)
    assert torch.equal((after != before).any(-1), LEFT.bool()) and h.applied == LEFT.sum()
    before = block_output(model, mask=RIGHT)
    with steering(model, TWIST, layer=LAYER, T=1., positions=torch.tensor([2, 7, 1])): after = block_output(model, mask=RIGHT)
    expected = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0]]).bool()
    assert torch.equal((after != before).any(-1), expected)


def test_earlier_logits_stay(model):
    before = logits(model)
    with steering(model, TWIST, layer=LAYER, T=1.): after = logits(model)
    assert untouched(after[:, :-1], before[:, :-1], model)
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_zero_strength_changes_nothing(model):
    before = logits(model, mask=LEFT)
    with steering(model, TWIST, layer=LAYER, T=0.): assert torch.equal(logits(model, mask=LEFT), before)


def test_the_model_comes_back_bit_for_bit(model):
    before, clean = logits(model), hooks(model)
    with steering(model, TWIST, layer=LAYER, T=1.): assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError):
        with steering(model, TWIST, layer=LAYER, T=1.), steering(model, Twist(1), layer=2, T=1.): 1 / 0
    assert torch.equal(logits(model), before)
    first, second = steering(model, TWIST, layer=LAYER, T=1.), steering(model, Twist(1), layer=LAYER, T=1.)
    first.remove()
    with steering(model, Twist(1), layer=LAYER, T=1.) as third: twice = logits(model)
    second.remove()
    third.remove()
    assert torch.equal(logits(model), before) and not torch.equal(twice, before)
    assert hooks(model) == clean and "generate" not in vars(model)


def test_greedy_is_the_same_with_and_without_cache(model):
    expected = torch.stack([reference_greedy(model, row) for row in IDS])
    plain = model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)[:, 7:]
    with steering(model, TWIST, layer=LAYER, T=1.) as h:
        for kw in (dict(), dict(use_cache=False), dict(cache_implementation="static")):
            assert torch.equal(model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, **kw)[:, 7:], expected), kw
    assert not torch.equal(plain, expected)
    assert h.applied == 3 * (6 + sum(range(1, 7)) + 6)


def test_greedy_is_the_same_when_tokens_are_drafted(model):
    if model.config.model_type == "mamba": pytest.skip("transformers has no assisted decoding for recurrent models")
    draft = tiny_model(next(k for k in CONFIGS if the_model(k) is model), seed=1)
    same = copy.deepcopy(model)  # drafts what the unsteered model would say, so that some drafts are accepted and some are not
    repeats = torch.cat([IDS[:1], IDS[:1]], 1)
    for ids in (IDS[:1], repeats):
        expected = reference_greedy(model, ids[0], T=.3, n=10)
        with steering(model, TWIST, layer=LAYER, T=.3):
            for kw in (dict(assistant_model=draft), dict(assistant_model=same), dict(prompt_lookup_num_tokens=3)):
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, **kw)
                assert torch.equal(out[0, ids.shape[1]:][:10], expected), kw  # transformers before 5.14 looks up one token too many


def test_a_batch_padded_on_the_left_answers_like_its_rows(model):
    expected = torch.stack([reference_greedy(model, row[keep.bool()]) for row, keep in zip(IDS, LEFT)])
    with steering(model, TWIST, layer=LAYER, T=1.):
        for kw in (dict(), dict(use_cache=False), dict(cache_implementation="static")):
            assert torch.equal(model.generate(input_ids=IDS, attention_mask=LEFT, **GREEDY, **kw)[:, 7:], expected), kw


def test_strength_per_row(model):
    T = torch.tensor([0., 1., .5])
    expected = torch.stack([reference_greedy(model, row, T=t) for row, t in zip(IDS, T.tolist())])
    with steering(model, TWIST, layer=LAYER, T=T):
        assert torch.equal(model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)[:, 7:], expected)
        beams = model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, num_beams=3, num_return_sequences=2)
    for i, t in enumerate(T.tolist()):
        with steering(model, TWIST, layer=LAYER, T=t): alone = model.generate(input_ids=IDS[i:i + 1], attention_mask=MASK[:1], **GREEDY, num_beams=3, num_return_sequences=2)
        assert torch.equal(beams[2 * i:2 * i + 2], alone)


def test_collected_activations_are_those_of_single_texts(model, tok):
    texts = ["a short one", "x", "quite a bit longer than the others", "who?"]
    acts = collect_activations(model, tok, texts, layers=[0, 2, -1], batch_size=3, progress=False)
    for i, text in enumerate(texts):
        ids = torch.tensor([tok(text)["input_ids"]])
        for layer, a in acts.items():
            assert a.dtype == torch.float32 and a.shape == (4, WIDTH)
            torch.testing.assert_close(a[i], block_output(model, layer, ids, torch.ones_like(ids))[0, -1], rtol=1e-4, atol=1e-4)


def test_inputs_of_blocks(model, tok):
    "What a block is given, as a hook of our own sees it; above the first block, what the one below hands on"
    texts = ["a short one", "x", "quite a bit longer than the others"]
    inputs = collect_activations(model, tok, texts, layers=[0, 2, -1], site="input", batch_size=2, progress=False)
    for layer, a in inputs.items():
        for i, text in enumerate(texts):
            seen, ids = [], torch.tensor([tok(text)["input_ids"]])
            hook = decoder_layers(model)[layer].register_forward_pre_hook(lambda m, args, kw: seen.append((args[0] if args else kw["hidden_states"]).clone()), with_kwargs=True)
            logits(model, ids, torch.ones_like(ids))
            hook.remove()
            torch.testing.assert_close(a[i], seen[0][0, -1], rtol=1e-4, atol=1e-4)
    below = collect_activations(model, tok, texts, layers=[1, 2], batch_size=2, progress=False)
    torch.testing.assert_close(inputs[2], below[1], rtol=0, atol=0)
    torch.testing.assert_close(inputs[-1], below[2], rtol=0, atol=0)


def test_unsteered_history_is_a_loop_that_steers_only_the_last_token(model):
    "Every pass computes the whole sequence anew and moves the state of its last token"
    def reference(ids, n=6):
        def hook(m, a, out):
            y = out if torch.is_tensor(out) else out[0]
            y = torch.cat([y[:, :-1], TWIST.move(y[:, -1:], torch.tensor(1.))], 1)
            return y if torch.is_tensor(out) else (y, *out[1:])
        handle, q, ids = decoder_layers(model)[LAYER].register_forward_hook(hook), len(ids), ids[None]
        for _ in range(n): ids = torch.cat([ids, logits(model, ids, torch.ones_like(ids))[:, -1:].argmax(-1)], 1)
        handle.remove()
        return ids[0, q:]
    expected = torch.stack([reference(row[keep.bool()]) for row, keep in zip(IDS, LEFT)])
    with steering(model, TWIST, layer=LAYER, T=1., history="unsteered") as h:
        out = model.generate(input_ids=IDS, attention_mask=LEFT, use_cache=False, **GREEDY)[:, 7:]
        with pytest.raises(ValueError, match=r"this pass was given a cache.*use_cache=False"): model.generate(input_ids=IDS, attention_mask=LEFT, **GREEDY)
    assert torch.equal(out, expected) and h.applied == 18
    told = {}
    for history in ("steered", "unsteered"):
        with steering(model, TWIST, layer=LAYER, T=1., history=history): told[history] = model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **GREEDY, output_logits=True, return_dict_in_generate=True).logits
    assert torch.equal(told["steered"][0], told["unsteered"][0]) and not torch.allclose(told["steered"][1], told["unsteered"][1])


def test_scores_are_those_of_single_texts(model, tok):
    prompts, answers = ["who are you?", "q", "why not?"], [" me", " a long answer", " because."]
    for T in (0., 1.):
        expected = []
        for p, a in zip(prompts, answers):
            ids, q = torch.tensor(tok(p + a)["input_ids"]), len(tok(p)["input_ids"])
            def hook(m, args, out):
                y = out if torch.is_tensor(out) else out[0]
                y = torch.cat([y[:, :q - 1], TWIST.move(y[:, q - 1:], torch.tensor(T))], 1)
                return y if torch.is_tensor(out) else (y, *out[1:])
            handle = decoder_layers(model)[LAYER].register_forward_hook(hook)
            logp = logits(model, ids[None], torch.ones_like(ids[None]))[0].log_softmax(-1)
            handle.remove()
            expected.append(logp[range(q - 1, len(ids) - 1), ids[q:]].sum())
        with steering(model, TWIST, layer=LAYER, T=T): scores = score_continuations(model, tok, prompts, answers, batch_size=2)
        torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_generated_text_is_scored_as_it_was_generated(model):
    "The greedy answer's log-probability, from the scores of generate and from one pass over prompt and answer"
    with steering(model, TWIST, layer=LAYER, T=1.):
        out = model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, output_logits=True, return_dict_in_generate=True)
    step = torch.stack(out.logits, 1).log_softmax(-1)
    with steering(model, TWIST, layer=LAYER, T=1., positions=torch.full((3,), 7)): full = logits(model, out.sequences, torch.ones_like(out.sequences))
    torch.testing.assert_close(full[:, 6:-1].log_softmax(-1), step, rtol=1e-3, atol=1e-3)


def test_unsteered_history_outside_generate(llama, tok):
    "Rows padded on either side, refusals, and what is collected"
    before = block_output(llama, mask=RIGHT)
    with steering(llama, TWIST, layer=LAYER, T=1., history="unsteered"):
        assert torch.equal((block_output(llama, mask=RIGHT) != before).any(-1).sum(1), torch.ones(3, dtype=torch.long))
        own = collect_activations(llama, tok, ["hello", "a longer text"], layers=LAYER, progress=False)[LAYER]
        with pytest.raises(ValueError, match="an answer scored in one pass needs all of its tokens"): score_continuations(llama, tok, ["q"], [" me"])
        with torch.no_grad(): cache = llama(input_ids=IDS[:1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="given a cache"): llama(input_ids=IDS[:1, :1], past_key_values=cache)
    with steering(llama, TWIST, layer=LAYER, T=1.): assert torch.equal(own, collect_activations(llama, tok, ["hello", "a longer text"], layers=LAYER, progress=False)[LAYER])
    with pytest.raises(ValueError, match="history must be 'steered' or 'unsteered'; got 'none'"): steering(llama, TWIST, layer=0, history="none")
    with pytest.raises(ValueError, match="positions must be 'last'; got 'all'"): steering(llama, TWIST, layer=0, positions="all", history="unsteered")


# The ways a model is called

def test_a_continued_cache_is_steered_at_every_new_token(llama):
    "A loop of one's own, in which tokens arrive one by one or several at once"
    expected = reference_greedy(llama, IDS[0], n=5)
    with steering(llama, TWIST, layer=LAYER, T=1.), torch.no_grad():
        out = llama(input_ids=IDS[:1], use_cache=True)
        tokens = [out.logits[0, -1].argmax()]
        for _ in range(4):
            out = llama(input_ids=tokens[-1][None, None], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[0, -1].argmax())
        assert torch.equal(torch.stack(tokens), expected)
        first = llama(input_ids=IDS[:1], use_cache=True)
        several = llama(input_ids=expected[None, :4], past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(several.logits[0].argmax(-1), expected[1:])


def test_conversation_that_continues_a_cache(llama):
    "generate may be given a filled cache: only the last prompt token and the new ones are steered"
    expected = reference_greedy(llama, IDS[0])
    for n in (1, 4, 6):
        with torch.no_grad(): cache = llama(input_ids=IDS[:1, :n], use_cache=True).past_key_values
        with steering(llama, TWIST, layer=LAYER, T=1.): out = llama.generate(input_ids=IDS[:1], attention_mask=MASK[:1], past_key_values=cache, **GREEDY)
        assert torch.equal(out[0, 7:], expected)


def test_prompt_in_chunks_and_as_embeddings(llama):
    expected = reference_greedy(llama, IDS[0])
    with steering(llama, TWIST, layer=LAYER, T=1.):
        assert torch.equal(llama.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **GREEDY, prefill_chunk_size=3)[0, 7:], expected)
        assert torch.equal(llama.generate(inputs_embeds=llama.get_input_embeddings()(IDS[:1]), attention_mask=MASK[:1], **GREEDY)[0], expected)
        assert torch.equal(llama.generate(IDS[:1], **GREEDY)[0, 7:], expected)


def test_sampling_with_a_seed(llama, tok):
    kw = dict(max_new_tokens=6, do_sample=True, seed=3)
    state = torch.get_rng_state()
    with steering(llama, TWIST, layer=LAYER, T=1.):
        one, two = (generate_text(llama, tok, ["hello", "you"], **kw) for _ in range(2))
        other = generate_text(llama, tok, ["hello", "you"], **{**kw, "seed": 4})
        many = generate_text(llama, tok, ["hello", "you"], **kw, num_return_sequences=3)
    assert one == two != other and len(many) == 6
    assert torch.equal(torch.get_rng_state(), state)


def test_streaming_from_a_thread(llama, tok):
    from transformers import TextIteratorStreamer
    inputs = tok("hello", return_tensors="pt")
    with steering(llama, TWIST, layer=LAYER, T=1.):
        expected = generate_text(llama, tok, ["hello"], **GREEDY)
        streamer = TextIteratorStreamer(tok, skip_prompt=True, skip_special_tokens=True, timeout=300)  # an error in the thread must not hang the test
        thread = threading.Thread(target=llama.generate, kwargs=dict(**inputs, **GREEDY, streamer=streamer))
        thread.start()
        streamed = "".join(streamer)
        thread.join()
    assert [streamed] == expected


def test_several_threads_generate_at_once(llama):
    "Prompts of different length at the same time: each is steered from its own last token on"
    prompts = [IDS[0, :n] for n in (2, 4, 5, 7)]
    expected, found = [reference_greedy(llama, p) for p in prompts], [None] * 4
    def work(i): found[i] = llama.generate(input_ids=prompts[i][None], attention_mask=torch.ones(1, len(prompts[i]), dtype=torch.long), **GREEDY)[0, len(prompts[i]):]
    with steering(llama, TWIST, layer=LAYER, T=1.):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_pipeline(llama, tok):
    from transformers import pipeline
    with steering(llama, TWIST, layer=LAYER, T=1.):
        expected = generate_text(llama, tok, ["hello"], **GREEDY)
        assert pipeline("text-generation", model=llama, tokenizer=tok)("hello", return_full_text=False, **GREEDY)[0]["generated_text"] == expected[0]


@pytest.mark.parametrize("arch", ["llama", "falcon", "mamba", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(arch, dtype):
    if arch == "falcon" and dtype == torch.float16: pytest.skip("float16 is tried on three architectures")
    model = copy.deepcopy(the_model(arch)).to(dtype)
    caa = fitted()
    before = block_output(model)
    with steering(model, caa, layer=LAYER, T=1.):
        after = block_output(model)
        model.generate(input_ids=IDS, attention_mask=LEFT, **GREEDY)
    assert after.dtype == before.dtype == (torch.float32 if arch == "mamba" else dtype)  # mamba keeps its residual stream in float32
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert torch.equal(after[:, -1], (before[:, -1].float() + (caa.mean_pos_ - caa.mean_neg_)).to(before.dtype))


def test_device_map(llama, tok, tmp_path):
    "accelerate wraps the forward of every module, and may keep weights elsewhere"
    from accelerate import cpu_offload, dispatch_model
    texts, expected = ["hello", "a longer text"], reference_greedy(llama, IDS[0])
    acts = collect_activations(llama, tok, texts, layers=[1, 3], progress=False)
    for spread in (lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True), lambda m: cpu_offload(m, "cpu")):
        model = spread(copy.deepcopy(llama))
        with steering(model, TWIST, layer=LAYER, T=1.): assert torch.equal(model.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **GREEDY)[0, 7:], expected)
        for layer, a in collect_activations(model, tok, texts, layers=[1, 3], progress=False).items(): torch.testing.assert_close(a, acts[layer])
    llama.save_pretrained(tmp_path)
    model = type(llama).from_pretrained(tmp_path, device_map="auto")
    with steering(model, TWIST, layer=LAYER, T=1.): assert torch.equal(model.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **GREEDY)[0, 7:], expected)


@pytest.mark.parametrize("arch, way", [("llama", "wrapper"), ("llama", "forward"), ("falcon", "in place")])
def test_compiled(arch, way):
    "Hooks that come and go, and a strength that changes, reach compiled code"
    model, caa = tiny_model(arch, num_hidden_layers=2), fitted()
    def eager(T, same=copy.deepcopy(model)):
        with steering(same, caa, layer=LAYER, T=T): return logits(same)
    expected = {T: eager(T) for T in (1., 2., 0., -1.)}
    if way == "wrapper": run = torch.compile(model, backend="eager")
    else: run = model
    if way == "forward": model.forward = torch.compile(model.forward, backend="eager")
    if way == "in place": model.compile(backend="eager")
    plain = logits(run)
    handle = steering(run, caa, layer=LAYER, T=1.)
    for T in expected: handle.strength = T; torch.testing.assert_close(logits(run), expected[T])
    handle.strength = torch.tensor([0., 1., 2.])
    torch.testing.assert_close(logits(run), torch.stack([expected[T][i] for i, T in enumerate((0., 1., 2.))]))
    assert handle.applied == 15
    handle.remove()
    torch.testing.assert_close(logits(run), plain, rtol=0, atol=0)


def test_a_changed_strength_is_not_compiled_again():
    model, compiled = tiny_model("llama", num_hidden_layers=2), []
    def backend(graph, inputs): compiled.append(1); return graph
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    handle = steering(model, fitted(), layer=LAYER, T=1.)
    logits(model)
    first = len(compiled)
    for T in range(12): handle.strength = float(T); logits(model)
    assert len(compiled) == first
    handle.remove()


@pytest.mark.parametrize("method", ["CAA", "ODESteer"])
def test_compiled_generation_with_a_static_cache(method):
    "As transformers does on a GPU: decoding steps run as one compiled graph, made once for all prompts and strengths"
    model, graphs, caa = tiny_model("llama", num_hidden_layers=2), [], fitted(method=method, **(dict(n_components=64) if method == "ODESteer" else {}))
    def backend(graph, inputs): graphs.append(graph); return graph
    def answer(ids, **kw): return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **kw)[:, ids.shape[1]:]
    fast = dict(cache_implementation="static", compile_config=transformers.CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False))
    fast["compile_config"]._compile_all_devices = True
    expected = {}
    for T in (1., 0., 2.):
        with steering(model, caa, layer=LAYER, T=T): expected[T] = answer(IDS), answer(IDS[:, 2:])
    with steering(model, caa, layer=LAYER, T=1.) as h:
        for T in expected:
            h.strength = T
            assert torch.equal(answer(IDS, **fast), expected[T][0])
            if T == 1.: first = len(graphs)
            assert torch.equal(answer(IDS[:, 2:], **fast), expected[T][1])
    assert first == 1 and len(graphs) == 1 and h.applied == 3 * 2 * 3 * 6
    assert not torch.equal(expected[1.][0], expected[2.][0])


# What the hook costs

class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts the operations that PyTorch runs, and how many of them make a GPU's host wait"
    def __init__(self): super().__init__(); self.ops = collections.Counter()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))
    waits = property(lambda self: sum(self.ops[k] for k in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")))


def step(model, *steer, **how):
    "Operations of one decoding step behind a cache"
    with torch.no_grad(), steering(model, *steer, **how) if steer else warnings.catch_warnings():
        cache = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
        with Calls() as calls: model(input_ids=IDS[:, 6:], past_key_values=cache, use_cache=True)
    return calls


@pytest.mark.parametrize("name", [*ods.steerer_names(), *ods.steerer_names("placebo")])
def test_a_decoding_step_waits_for_nothing(llama, name):
    "No edit of a steerer reads a number back from the device"
    g = torch.Generator().manual_seed(0)
    kw = dict(n_components=64) if "odesteer" in name else {}
    steerer = ods.make_steerer(name, **kw).fit(torch.randn(40, WIDTH, generator=g) + .5, torch.randn(40, WIDTH, generator=g))
    step(llama, steerer, layer=LAYER, T=.5)  # copies to another precision are made at the first use
    plain = step(llama)
    for strength in (.5, torch.tensor([0., .5, 1.]), {"share": .1}):
        steered = step(llama, steerer, layer=LAYER, strength=strength)
        assert steered.waits == plain.waits and not {"lift_fresh", "lift_fresh_copy", "copy_", "_to_copy"} & set(steered.ops - plain.ops)  # and none is sent to it: both would end the capture of a CUDA graph
    class Peek:
        def edits(self, model, layer, strength): return {layer: lambda x, y, T: y + float(T)}
    assert step(llama, Peek(), layer=LAYER, T=1.).waits == plain.waits + 1  # what such steerers would look like
    class Send:
        def edits(self, model, layer, strength): return {layer: lambda x, y, T: y + torch.tensor([1.])}
    assert "lift_fresh" in step(llama, Send(), layer=LAYER, T=1.).ops


def test_a_decoding_step_copies_nothing(llama):
    "What the edit returns is the block's new output; no operation runs but the edit's own"
    class Keep:
        def edits(self, model, layer, strength):
            def edit(x, y, T): self.made = y + T; return self.made
            return {layer: edit}
    keep, plain = Keep(), step(llama)
    assert step(llama, keep, layer=LAYER, T=1.).ops - plain.ops == dict(add=1, view=3)
    with steering(llama, keep, layer=LAYER, T=1.), torch.no_grad():
        seen = []
        handle = decoder_layers(llama)[LAYER].register_forward_hook(lambda m, a, out: seen.append(out if torch.is_tensor(out) else out[0]))
        llama(input_ids=IDS[:, :1], use_cache=False)
        handle.remove()
    assert seen[0].data_ptr() == keep.made.data_ptr() and seen[0].shape == (3, 1, WIDTH)


def test_layers_share_the_search_for_their_tokens(llama):
    "A mask of positions is turned into indices once, however many blocks are steered"
    def waits(layers):
        with torch.no_grad(), steering(llama, {i: TWIST for i in layers}, T=1., positions=torch.tensor([2, 7, 1])), Calls() as calls: llama(input_ids=IDS, attention_mask=RIGHT, use_cache=False)
        return calls.waits
    assert waits(range(LAYERS)) == waits([0]) > 0


@pytest.mark.parametrize("mask", [MASK, RIGHT], ids=["full", "right"])
@pytest.mark.parametrize("positions", ["last", "all", torch.tensor([2, 4, 1])], ids=str)
def test_what_others_hold_does_not_change(llama, mask, positions):
    "A hook set before saw the block's own output, and keeps it"
    seen = []
    handle = decoder_layers(llama)[LAYER].register_forward_hook(lambda m, a, out: seen.append((out, out.clone())))
    with steering(llama, TWIST, layer=LAYER, T=1., positions=positions) as h: block_output(llama, mask=mask)
    with steering(llama, TWIST, layer=LAYER, T=1., positions=positions): llama.generate(IDS, attention_mask=MASK, **GREEDY)
    handle.remove()
    assert h.applied > 0 and len(seen) == 7 and all(torch.equal(held, copied) for held, copied in seen)


def test_a_new_strength_is_written_to_the_tensor_in_use(llama):
    "A captured graph reads the tensor that it was captured with; the caller's own tensor stays as it is"
    own = torch.tensor([1., 2., 3.])
    handle = steering(llama, fitted(), layer=LAYER, T=own)
    used = handle._values[LAYER]
    three = logits(llama)
    handle.strength = torch.tensor([3., 2., 1.])
    assert handle._values[LAYER] is used and own.tolist() == [1., 2., 3.] and not torch.equal(logits(llama), three)
    handle.strength = own
    assert handle._values[LAYER] is used and torch.equal(logits(llama), three)
    handle.strength = 2.  # another shape is another tensor
    assert handle._values[LAYER] is not used and handle._values[LAYER].shape == ()
    one = handle._values[LAYER]
    handle.strength = 1
    assert handle._values[LAYER] is one and one == 1.
    handle.remove()


# Handles, several layers, units

def fitted(width=WIDTH, method="CAA", **kw):
    g = torch.Generator().manual_seed(0)
    return getattr(ods, method)(**kw).fit(torch.randn(40, width, generator=g) + .5, torch.randn(40, width, generator=g))


def test_handle_and_strength(llama):
    before, caa = logits(llama), fitted()
    handle = steering(llama, caa, layer=LAYER, strength=1.)
    one = logits(llama)
    handle.strength = 2.
    two = logits(llama)
    handle.strength = {"share": .5}
    half = logits(llama)
    handle.strength = 1.
    assert torch.equal(logits(llama), one)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(llama), before)
    assert len({before.sum().item(), one.sum().item(), two.sum().item(), half.sum().item()}) == 4
    assert handle.applied == 12 and "removed" in repr(handle)
    with pytest.raises(RuntimeError, match="was removed"): handle.__enter__()


@pytest.mark.filterwarnings("ignore:.*could not reach the barrier level")
def test_units(llama):
    ode = fitted(method="ODESteer", n_components=64)
    before = block_output(llama)[:, -1]
    rows = torch.linspace(.5, 1.5, len(before))
    for unit in (dict(share=.2), dict(spread=.7), dict(spread=rows), dict(nats=.5), dict(until=0., T=5.), dict(until=0., spread=.5)):
        with steering(llama, ode, layer=LAYER, **unit): after = block_output(llama)[:, -1]
        torch.testing.assert_close(after, ode.steer(before, **unit))


def test_several_layers(llama):
    one, two = fitted(), fitted(method="ITI")
    with steering(llama, {0: one, -1: two}, T=1.5): together = logits(llama)
    with steering(llama, one, layer=0, T=1.5), steering(llama, two, layer=LAYERS - 1, T=1.5): nested = logits(llama)
    assert torch.equal(together, nested)


def test_controllers_see_input_and_output_of_each_block(llama):
    "The contract of feedback across layers: rows in one order at every layer, the input of a block being the steered output of the one below"
    seen = {}
    class Controller:
        def edits(self, model, layer, strength):
            def edit(l, x, y, T): seen[l] = x, y + T * .1; return seen[l][1]
            return {l: lambda x, y, T, l=l: edit(l, x, y, T) for l in range(1, LAYERS)}
    with steering(llama, Controller(), strength=2.): logits(llama, mask=LEFT)
    assert sorted(seen) == [1, 2, 3] and all(x.shape == (3, WIDTH) for x, _ in seen.values())
    for l in (2, 3): assert torch.equal(seen[l][0], seen[l - 1][1])


def test_a_plain_function_steers_as_an_edit_does(llama):
    "An object may have `edits` alone, and give functions; it may also give what the protocol says"
    class Protocol(Twist):
        def edits(self, model, layer, strength): return {layer: Edit(super().edits(model, layer, strength)[layer])}
    class Own:  # a callable of its own
        def __init__(self, twist): self.twist = twist
        def __call__(self, x, y, T): return self.twist.move(y, T)
        def edits(self, model, layer, strength): return {layer: self}
    answers = []
    for part in (TWIST, Protocol(), Own(TWIST)):
        with steering(llama, part, layer=LAYER, T=.7) as h: answers.append(logits(llama))
        assert all(type(edit) is Edit for edit in h._edits.values())
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_what_an_object_of_your_own_says_of_itself_counts(llama):
    class Says(Twist): width, about, unit, needs_layer = WIDTH, {"layer": LAYER}, "length", True
    with steering(llama, Says(), T=.7) as h: logits(llama)  # its card names the layer
    assert list(h._edits) == [LAYER]
    with pytest.raises(ValueError, match="say how far to steer"): steering(llama, Says())
    with pytest.warns(UserWarning, match="this Says was fitted on layer 1, not 2"), steering(llama, Says(), layer=2, T=1.): logits(llama)
    for attribute, message in (dict(about={}), "say which block to steer: .*this Says's card names none"), (dict(width=16), "this Says was fitted on activations of width 16"):
        with pytest.raises(ValueError, match=message): steering(llama, type("Says", (Says,), attribute)(), T=1.)
    class Doubles(Twist):
        def resolve(self, strength): return 2 * torch.as_tensor(strength, dtype=torch.float32)
    with steering(llama, Doubles(), layer=LAYER, T=.5): twice = logits(llama)
    with steering(llama, TWIST, layer=LAYER, T=1.): assert torch.equal(logits(llama), twice)


def test_a_model_knows_whether_it_is_steered(llama):
    other = copy.deepcopy(llama)
    assert is_steered(llama) is False
    with steering(llama, TWIST, layer=0, T=1.):
        with steering(llama, TWIST, layer=1, T=1.): logits(llama)
        assert is_steered(llama) is True and is_steered(torch.compile(llama)) and not is_steered(other)
        logits(llama)
    assert not is_steered(llama)


def test_a_steerer_knows_where_it_belongs(llama, tok):
    caa = fitted()
    caa.about.update(describe_site(llama, tok, -2), model="somebody/else")
    with pytest.raises(RuntimeError, match="never applied"):
        with steering(llama, caa): pass
    with steering(llama, caa) as h: logits(llama)
    assert list(h._edits) == [LAYERS - 2] and h.strength == 1.0
    with pytest.warns(UserWarning, match="fitted on layer 2, not 1"), steering(llama, caa, layer=1): logits(llama)
    named = copy.deepcopy(llama)
    named.config._name_or_path = "me/this"
    with pytest.warns(UserWarning, match="fitted on model 'somebody/else', not 'me/this'"), steering(named, caa): logits(named)
    site = describe_site(llama, tok, -2, example=[{"role": "user", "content": "hi"}])
    assert site["layer"] == 2 and site["site"] == "output of model.layers.2" and site["width"] == WIDTH and "chat template" in site["prompt_format"]


def test_an_error_inside_is_not_hidden(llama):
    with pytest.raises(KeyError):
        with steering(llama, TWIST, layer=0, T=1.): raise KeyError("mine")


def test_a_steered_model_cannot_be_copied(llama):
    "The copy would go on with hooks that nobody can remove"
    model = copy.deepcopy(llama)
    handle = steering(model, TWIST, layer=0, T=1.)
    with pytest.raises(RuntimeError, match="remove the steering first"): copy.deepcopy(model)
    handle.remove()
    assert torch.equal(logits(copy.deepcopy(model)), logits(llama))


def test_maths_in_float32_under_autocast(llama):
    seen = []
    class Spy(Twist):
        def move(self, y, T): seen.append((y @ y.T).dtype); return y
    with torch.autocast("cpu", dtype=torch.bfloat16), steering(llama, Spy(), layer=LAYER, T=1.): block_output(llama)
    assert seen == [torch.float32]


def test_encoder_decoders_are_refused():
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="only decoder-only models"): decoder_layers(t5)


def test_nothing_applied_is_an_error(llama):
    with pytest.raises(RuntimeError, match="never applied.*same model|never applied.*this model"):
        with steering(llama, TWIST, layer=0, T=1.): logits(copy.deepcopy(the_model("qwen2")))
    steering(llama, TWIST, layer=0, T=1.).remove()


def test_blocks_by_name(llama):
    assert decoder_layers(llama, "model.layers") is llama.model.layers
    with steering(llama, TWIST, layer=0, T=1., blocks="model.layers"): logits(llama)

    class Unusual(nn.Module):
        "No get_decoder, and two lists of the same length"
        def __init__(self):
            super().__init__()
            self.config, self.inner = llama.config, nn.Module()
            self.embed, self.one, self.two = llama.model.embed_tokens, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.ModuleList(nn.Identity() for _ in range(LAYERS))
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for f in self.one: x = f(x)
            return x
    model = Unusual()
    with pytest.raises(ValueError, match="found 2 lists of 4 blocks.*blocks='one'"): steering(model, TWIST, layer=0, T=1.)
    before = model(IDS)
    with steering(model, TWIST, layer=3, T=1., blocks="one"): after = model(IDS)
    assert torch.equal((before != after).any(-1), torch.arange(7).expand(3, 7) == 6)


def test_language_part_of_a_vision_model(tok):
    vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**CONFIGS["llama"][1]), vision_config=vision, image_token_index=VOCAB - 1)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert describe_site(model, tok, 1)["site"] == "output of model.language_model.layers.1"
    with steering(model, TWIST, layer=1, T=1.) as h: model.generate(input_ids=IDS[:1] % (VOCAB - 1), attention_mask=MASK[:1], **GREEDY, eos_token_id=VOCAB)
    assert h.applied == 6 and collect_activations(model, tok, ["hello"], layers=1, progress=False)[1].shape == (1, WIDTH)


# Gradients, other ways in

def test_gradient_with_respect_to_strength(llama):
    T = torch.tensor(1., requires_grad=True)
    def loss(t):
        with steering(llama, TWIST, layer=LAYER, T=t): return llama(input_ids=IDS[:1]).logits[0, -1].square().mean()
    slope, = torch.autograd.grad(loss(T), T)
    with torch.no_grad(): secant = (loss(torch.tensor(1.01)) - loss(torch.tensor(.99))) / .02
    torch.testing.assert_close(slope, secant, rtol=1e-2, atol=1e-3)


def test_handle_made_in_inference_mode(llama):
    expected = reference_greedy(llama, IDS[0])
    with torch.inference_mode(): handle = steering(llama, TWIST, layer=LAYER, T=2.)
    handle.strength = 1.
    assert torch.equal(llama.generate(input_ids=IDS[:1], **GREEDY)[0, 7:], expected)
    handle.remove()


# Texts, chats, padding

CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]


def test_one_beginning_of_sequence(tok):
    for text in ("hi", "<s>hi", CHAT, CHAT[:1], ("hi", " you"), (CHAT[:1], "me"), tok.apply_chat_template(CHAT, tokenize=False)):
        assert encode(tok, [text])[0].ids.count(1) == 1, text


def test_a_chat_ends_with_its_answer(tok):
    "What the template puts behind an answer is not read, and a chat means the same tokens as its prompt with the answer"
    whole, split = encode(tok, [CHAT, (CHAT[:1], "me")])
    assert whole.ids == split.ids and tok.decode(whole.ids[-2:]) == "me" and tok.decode(split.ids[split.answer:]) == "me"
    assert tok.decode(encode(tok, [CHAT[:1]])[0].ids).endswith("|a:")


def test_prompt_tokens_are_those_of_generation():
    "Where the tokenizer would merge across the border, the prompt's own tokens win"
    class Merging:
        bos_token = chat_template = None
        def __call__(self, text, add_special_tokens): return {"input_ids": [ord(t) for t in text.replace("ab", "_")]}
    one, = encode(Merging(), [("xa", "by")])
    assert one.ids[:2] == Merging()("xa", False)["input_ids"] and one.answer == 2 and len(one.ids) == 4


def test_tokenizer_without_padding_or_start(llama):
    "No pad token, no BOS: nothing to complain about, and the tokenizer is left as it was"
    tok = tiny_tokenizer(bos=False)
    tok.pad_token = None
    tok.padding_side = "right"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acts = collect_activations(llama, tok, ["hello", "a longer text"], layers=1, progress=False)
        text = generate_text(llama, tok, ["hello", "a longer text"], **GREEDY)
    assert tok.pad_token is None and tok.padding_side == "right" and acts[1].shape == (2, WIDTH)
    assert text == [generate_text(llama, tok, [p], **GREEDY)[0] for p in ("hello", "a longer text")]


def test_padding_side_of_the_tokenizer_does_not_matter(llama, tok):
    texts = ["a short one", "x", "quite a bit longer"]
    for side in ("left", "right"):
        tok.padding_side = side
        acts = collect_activations(llama, tok, texts, layers=2, progress=False)[2]
        batch = tok(texts, return_tensors="pt", padding=True)
        with torch.no_grad(): hidden = llama(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(0), output_hidden_states=True).hidden_states[3]
        last = (batch["attention_mask"] * torch.arange(hidden.shape[1])).argmax(1)
        torch.testing.assert_close(acts, hidden[range(3), last], rtol=1e-4, atol=1e-5)


def test_positions_to_read(llama, tok):
    pairs = [("who?", " me"), ("why", " because")]
    split = encode(tok, pairs)
    every = collect_activations(llama, tok, [p + a for p, a in pairs], layers=2, positions="all", progress=False)[2]
    read = lambda positions: collect_activations(llama, tok, pairs, layers=2, positions=positions, progress=False)[2]
    for i, e in enumerate(split):
        assert every[i].shape == (len(e.ids), WIDTH)
        for positions, expected in dict(last=every[i][-1], prompt=every[i][e.answer - 1], mean=every[i][e.answer:].mean(0), all=every[i][e.answer:]).items():
            torch.testing.assert_close(read(positions)[i], expected, rtol=1e-4, atol=1e-5)
        for k in (0, 2, -3): torch.testing.assert_close(read(k)[i], every[i][k], rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_above_the_top_layer(llama, tok):
    ran = []
    handles = [m.register_forward_hook(lambda m, a, out, name=name: ran.append(name)) for name, m in llama.named_modules()]
    collect_activations(llama, tok, ["hello"], layers=[0, 1], progress=False)
    for h in handles: h.remove()
    assert any(n.startswith("model.layers.1") for n in ran) and not any(n.startswith("model.layers.2") for n in ran)
    ran.clear()
    handles = [m.register_forward_hook(lambda m, a, out, name=name: ran.append(name)) for name, m in llama.named_modules()]
    collect_activations(llama, tok, ["hello"], layers=[0, 2], site="input", progress=False)
    for h in handles: h.remove()
    assert any(n.startswith("model.layers.1") for n in ran) and not any(n.startswith(("model.layers.2", "model.layers.3", "lm_head", "model.norm")) for n in ran)


def test_collecting_from_a_model_in_training_or_compiled(tok):
    model = tiny_model("gpt2", n_layer=2)
    expected = collect_activations(model, tok, ["hello", "you"], layers=1, progress=False)[1]
    model.train()
    model.transformer.h[0].eval()
    assert torch.equal(collect_activations(model, tok, ["hello", "you"], layers=1, progress=False)[1], expected)
    assert model.training and not model.transformer.h[0].training
    model.eval()
    for run in (torch.compile(model, backend="eager"), model):
        model.compile(backend="eager")
        for block in model.transformer.h: block.compile(backend="eager")
        torch.testing.assert_close(collect_activations(run, tok, ["hello", "you"], layers=1, progress=False)[1], expected)


def test_collecting_while_steered(llama, tok):
    texts = ["hello", "a longer text", "you"]
    T = torch.tensor([0., 1., 2.])
    before = collect_activations(llama, tok, texts, layers=LAYER, progress=False)[LAYER]
    with steering(llama, TWIST, layer=LAYER, T=T): after = collect_activations(llama, tok, texts, layers=LAYER, batch_size=2, progress=False)[LAYER]
    torch.testing.assert_close(after, TWIST.move(before, T), rtol=1e-4, atol=1e-4)
    pairs = [("hello", " me"), ("a longer", " text")]  # the answer's tokens are steered as they would be in generation
    own = collect_activations(llama, tok, pairs, layers=LAYER, positions="prompt", progress=False)[LAYER]
    with steering(llama, TWIST, layer=LAYER, T=1.): ends = collect_activations(llama, tok, pairs, layers=LAYER, positions="prompt", progress=False)[LAYER]
    torch.testing.assert_close(ends, TWIST.move(own, torch.ones(())), rtol=1e-4, atol=1e-4)


def test_strength_per_prompt_across_batches(llama, tok):
    prompts, T = ["hello", "a longer text", "you", "who?"], torch.tensor([0., 1., 2., .5])
    answers = [" me"] * 4
    with steering(llama, TWIST, layer=LAYER, T=T):
        texts, scores = generate_text(llama, tok, prompts, batch_size=3, **GREEDY), score_continuations(llama, tok, prompts, answers, batch_size=3)
    for i, t in enumerate(T.tolist()):
        with steering(llama, TWIST, layer=LAYER, T=t):
            assert generate_text(llama, tok, prompts[i:i + 1], **GREEDY) == texts[i:i + 1]
            torch.testing.assert_close(score_continuations(llama, tok, prompts[i:i + 1], answers[:1]), scores[i:i + 1], rtol=1e-4, atol=1e-3)


# Disk

def test_cache_on_disk(tok, tmp_path):
    model, texts, passes = tiny_model("llama"), ["hello", "a longer text"], []
    model.model.register_forward_pre_hook(lambda *a: passes.append(1))
    def collect(layers=(1,), texts=texts, **kw):
        passes.clear()
        return collect_activations(model, tok, texts, layers=list(layers), cache_dir=tmp_path, progress=False, **kw), len(passes)
    first, n = collect()
    again, m = collect()
    assert (n, m) == (1, 0) and torch.equal(first[1], again[1])
    assert collect(layers=(1, 2))[1] == 1 and collect(layers=(2, -2))[1] == 0
    inputs, n = collect(layers=(2,), site="input")
    assert n == 1 and torch.equal(inputs[2], first[1]) and collect(layers=(2,), site="input")[1] == 0
    assert collect(texts=["hello", "a longer texT"])[1] == collect(positions="mean")[1] == 1
    ragged, _ = collect(positions="all")
    again, m = collect(positions="all")
    assert m == 0 and all(torch.equal(a, b) for a, b in zip(ragged[1], again[1]))
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1e-3
    assert collect()[1] == 1, "another model must not be served the first one's activations"
    assert collect()[1] == 0
    with pytest.raises(ValueError, match="cache cannot know how"), steering(model, TWIST, layer=0, T=1.): collect()


@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"\xff" * 99])
def test_damaged_cache_is_collected_again(llama, tok, tmp_path, damage):
    collect = lambda: collect_activations(llama, tok, ["hello"], layers=1, cache_dir=tmp_path, progress=False)[1]
    a = collect()
    file, = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"): assert torch.equal(collect(), a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(collect(), a)


def test_fingerprint():
    a, b = tiny_model("llama"), tiny_model("llama")
    assert fingerprint(a) == fingerprint(b) != fingerprint(tiny_model("llama", seed=1))
    w = b.model.layers[2].self_attn.q_proj.weight.data
    w[[0, 1]] = w[[1, 0]]
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) != fingerprint(copy.deepcopy(a).bfloat16())


# One clear error each

def test_unknown_layer(llama, tok):
    for layer in (LAYERS, -LAYERS - 1):
        for act in (lambda: steering(llama, TWIST, layer=layer, T=1.), lambda: collect_activations(llama, tok, ["x"], layers=[layer]), lambda: describe_site(llama, tok, layer)):
            with pytest.raises(ValueError, match=rf"layer {layer} does not exist: this model has 4 blocks, 0 to 3"): act()
    with pytest.raises(TypeError, match="a layer is an integer; got 1.5"): steering(llama, TWIST, layer=1.5, T=1.)
    with pytest.raises(ValueError, match="say which block to steer"): steering(llama, fitted(), T=1.)
    with pytest.raises(ValueError, match="no list of blocks named 'transformer.h': it has model.layers"): decoder_layers(llama, "transformer.h")


def test_batch_size_and_layers(llama, tok):
    for n in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="batch_size must be 1 or more"): collect_activations(llama, tok, ["x"], batch_size=n)
    for layers in ("all", 1.0, {0: 1}):
        with pytest.raises(TypeError, match="layers must be a block's number"): collect_activations(llama, tok, ["x"], layers=layers)
    for layers in range(2), {0, 1}: assert list(collect_activations(llama, tok, ["x"], layers=layers)) == [0, 1]
    with pytest.raises(ValueError, match="max_length must be 2"): collect_activations(llama, tok, ["x"], max_length=0)


def test_model_and_tokenizer_swapped(llama, tok):
    for act in (lambda: collect_activations(tok, llama, ["x"]), lambda: generate_text(tok, llama, ["x"]), lambda: score_continuations(tok, llama, ["x"], ["y"]), lambda: describe_site(tok, llama, 1), lambda: steering(tok, TWIST, layer=1, T=1.)):
        with pytest.raises(TypeError, match="swapped"): act()
    for tokenizer in (None, "gpt2"):
        with pytest.raises(TypeError, match="tokenizer must be that of the model"): collect_activations(llama, tokenizer, ["x"])
    with pytest.raises(TypeError, match="must be a transformers model; got str"): decoder_layers("gpt2")


def test_wrong_width(llama):
    with pytest.raises(ValueError, match="fitted on activations of width 16, but LlamaForCausalLM has width 32"): steering(llama, fitted(16), layer=0, T=1.)
    with pytest.raises(RuntimeError, match="not fitted"): steering(llama, ods.CAA(), layer=0, T=1.)
    class Narrow(Twist):
        def move(self, y, T): return y[:, :3]
    with pytest.raises(ValueError, match=r"returned \(3, 3\)"), steering(llama, Narrow(), layer=0, T=1.): logits(llama)


def test_wrong_padding(llama):
    clean = hooks(llama)
    with pytest.raises(ValueError, match="padded on the right.*padding_side = 'left'"):
        with steering(llama, TWIST, layer=0, T=1.): llama.generate(input_ids=IDS, attention_mask=RIGHT, **GREEDY)
    ids = IDS.clone()
    ids[0, -1] = llama.config.pad_token_id
    with pytest.raises(ValueError, match="padded on the right"):
        with steering(llama, TWIST, layer=0, T=1.): llama.generate(ids, **GREEDY)
    assert hooks(llama) == clean
    llama.generate(input_ids=IDS, attention_mask=RIGHT, **GREEDY)  # unsteered, the model is as it was


def test_wrong_strength(llama, tok):
    with pytest.raises(ValueError, match="two names for the same thing"): steering(llama, fitted(), layer=0, T=1., strength=1.)
    with pytest.raises(ValueError, match="say how far to steer"): steering(llama, fitted(method="ITI"), layer=0)
    with pytest.raises(ValueError, match="a dict of units already"): steering(llama, fitted(), layer=0, T={"share": 1.}, share=.5)
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"): steering(llama, fitted(), layer=0, T=torch.ones(2, 2))
    with steering(llama, fitted(), layer=0, T=[1., 2.]):
        with pytest.raises(ValueError, match="strength has 2 rows, but there are 3"): logits(llama)
        with pytest.raises(ValueError, match="strength has 2 rows, but there are 4"): logits(llama, IDS[:2].repeat(2, 1), MASK[:2].repeat(2, 1))
        with pytest.raises(ValueError, match="strength has 2 rows, but there are 1"): llama.generate(IDS[:1], num_beams=2, **GREEDY)
        with pytest.raises(ValueError, match="strength has 2 rows, but there are 4"): generate_text(llama, tok, ["a", "b", "c", "d"], **GREEDY)
        logits(llama, IDS[:2], MASK[:2])
    with pytest.raises(ValueError, match="positions must be"): steering(llama, fitted(), layer=0, positions="first")
    with pytest.raises(TypeError, match="cannot steer with str"): steering(llama, "caa", layer=0)
    with pytest.raises(TypeError, match="CAA is a class: make one and fit it"): steering(llama, ods.CAA, layer=0)
    with pytest.raises(ValueError, match="at least one layer"): steering(llama, {}, T=1.)


@pytest.mark.parametrize("texts, message", [
    ([], "texts is empty"), ("hello", "wrap a single text"), ([""], r"text 0 \(''\) has an empty prompt"), (["x", 3], "text 1 must be a str"), ([("a", "")], "empty answer"), ([("", "a")], "empty prompt")])
def test_bad_texts(llama, texts, message):
    with pytest.raises((ValueError, TypeError), match=message): collect_activations(llama, tiny_tokenizer(bos=False), texts, layers=0, progress=False)


def test_other_bad_input(llama, tok):
    with pytest.raises(ValueError, match="site must be 'output' or 'input' of the blocks; got 'both'"): collect_activations(llama, tok, ["x"], site="both")
    with pytest.raises(ValueError, match="positions must be 'last', 'mean', 'template', 'all', 'prompt' or an index; got 'first'"): collect_activations(llama, tok, ["x"], positions="first", progress=False)
    with pytest.raises(ValueError, match="text 1 has 2 tokens, so it has none at position 3"): collect_activations(llama, tok, ["xyz", "x"], positions=3, progress=False)
    with pytest.raises(ValueError, match="2 prompts but 1 continuations"): score_continuations(llama, tok, ["a", "b"], ["c"])
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"): encode(plain, [CHAT])


def test_texts_that_are_too_long(llama, tok):
    text = "abc" * 60
    with pytest.raises(ValueError, match=r"text 1 has 181 tokens, but the model's context is 128 \(1 of 2 texts"): collect_activations(llama, tok, ["x", text], layers=0, progress=False)
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 20 tokens; tokens after the first"): acts = collect_activations(llama, tok, ["x", text], layers=0, max_length=20, progress=False)
    ids = torch.tensor([[1, *tok(text)["input_ids"][-19:]]])
    torch.testing.assert_close(acts[0][1], block_output(llama, 0, ids, torch.ones_like(ids))[0, -1], rtol=1e-4, atol=1e-5)


def test_overflow_is_named(tok):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="output of layer 1 holds NaN or infinity at text 0"): collect_activations(model, tok, ["hello"], layers=[0, 1], progress=False)


# The pure functions

def test_padded():
    batch = [Encoded([5, 6]), Encoded([7])]
    assert padded(batch, 0)["input_ids"].tolist() == [[5, 6], [7, 0]] and padded(batch, 0, "left")["input_ids"].tolist() == [[5, 6], [0, 7]]
    assert padded(batch, 0, "left")["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_steered_positions_against_a_loop():
    "However a sequence is cut into passes, each token from the last prompt token on is steered once"
    q, total = 5, 9
    for cuts in ([5, 1, 1, 1, 1], [2, 3, 1, 3], [3, 3, 3], [9], [6, 2, 1]):
        steered, start = torch.zeros(2, total, dtype=torch.int), 0
        for n in cuts:
            where = steered_positions("last", n, start, first=q - 1)
            if where is not None: steered[:, start:start + n][where] += 1
            start += n
        assert steered.tolist() == [[0] * (q - 1) + [1] * (total - q + 1)] * 2
