"Whoever calls and whatever is called: threads, tasks, streams, forks, labels, packed rows, prefixes, guidance, wrappers"
import asyncio
import copy
import gc
import multiprocessing
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import odesteer as ods
from odesteer.hooks import Steering, generate_text, score_continuations, score_encoded, steering
from odesteer.models import (
    Encoded, collect_activations, decoder_layers, encode, fingerprint, is_steered, length_batches, pad_id,
    text_tokenizer, unwrapped)

from .archs import LAYERS, VOCAB, WIDTH, tiny_model, tiny_tokenizer
from .test_models import GREEDY, IDS, LAYER, LEFT, MASK, RIGHT, TWIST, logits, the_model

SOME = "llama", "gpt2", "qwen3", "falcon", "mamba"  # mamba has no cache of keys and values
ONE = IDS[:1]


@pytest.fixture(params=SOME)
def model(request): return the_model(request.param)

@pytest.fixture
def llama(): return the_model("llama")

@pytest.fixture(scope="session")
def tok(): return tiny_tokenizer()


def answer(model, ids=ONE, **kw): return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **(GREEDY | kw))[0, ids.shape[1]:]

def alone(model, T, ids=ONE, **kw):
    with steering(model, TWIST, layer=LAYER, T=T): return answer(model, ids, **kw)

def in_thread(f, *args):
    "What a function returns or raises in a thread of its own"
    with ThreadPoolExecutor(1) as pool: return pool.submit(f, *args).result(60)

def clean(model):
    "Is no hook of ours left? transformers keeps some of its own"
    left = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return not any("odesteer" in getattr(getattr(h, "func", h), "__module__", "") for h in left)


# ---- threads and tasks

def test_each_thread_has_its_own_steering(model):
    strengths = (-1., -.5, .5, 1.)
    want, rounds = {T: alone(model, T) for T in strengths}, 8
    plain = answer(model)
    assert len({tuple(w.tolist()) for w in want.values()}) > 2
    meet, wrong, applied = threading.Barrier(len(strengths)), [], []
    def user(T):
        for _ in range(rounds):
            with steering(model, TWIST, layer=LAYER, T=T) as h:
                meet.wait(30)
                if not torch.equal(answer(model), want[T]): wrong.append(T)
                with torch.no_grad(): model(input_ids=IDS)
                meet.wait(30)
            applied.append(h.applied)
    threads = [threading.Thread(target=user, args=(T,)) for T in strengths]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert wrong == [] and applied == [6 + 3] * rounds * len(strengths) and torch.equal(answer(model), plain) and clean(model)


def test_each_task_has_its_own_steering_and_hands_it_on(llama):
    want = {T: alone(llama, T) for T in (-1., 1.)}
    async def user(T, others):
        with steering(llama, TWIST, layer=LAYER, T=T):
            await others()
            here = answer(llama)
            await others()
            elsewhere = await asyncio.to_thread(answer, llama)  # takes the context along
            child = await asyncio.create_task(later())
            await others()
        return all(torch.equal(a, want[T]) for a in (here, elsewhere, child))
    async def later(): return answer(llama)
    async def both():
        meet = asyncio.Barrier(2) if hasattr(asyncio, "Barrier") else None
        return await asyncio.gather(*(user(T, meet.wait if meet else lambda: asyncio.sleep(.01)) for T in want))
    assert asyncio.run(both()) == [True, True] and clean(llama)


def test_a_forward_pass_beside_an_answer_does_not_disturb_it(model):
    got, want = [], alone(model, 1., max_new_tokens=30)
    with steering(model, TWIST, layer=LAYER, T=1.) as h:
        t = threading.Thread(target=lambda: [got.append(answer(model, max_new_tokens=30)) for _ in range(4)])
        t.start()
        passes = 0
        while t.is_alive():
            with torch.no_grad(): model(input_ids=IDS[1:, :4])
            passes += 1
        t.join(60)
    assert len(got) == 4 and all(torch.equal(a, want) for a in got) and h.applied == 4*30 + 2*passes


def test_a_thread_without_its_own_gets_the_only_one_there_is(llama):
    want = {T: alone(llama, T) for T in (.5, 1.)}
    twice = steering(llama, TWIST, layer=LAYER, T=.5), steering(llama, TWIST, layer=2, T=1.)  # two handles of one thread are one owner
    here = answer(llama)
    assert torch.equal(in_thread(answer, llama), here) and not torch.equal(here, want[.5])
    twice[1].remove()
    assert torch.equal(in_thread(answer, llama), want[.5])
    def own():
        with steering(llama, TWIST, layer=LAYER, T=1.): return answer(llama)
    assert torch.equal(in_thread(own), want[1.]) and torch.equal(answer(llama), want[.5])  # not both
    twice[0].remove()
    assert clean(llama)


def test_where_several_steer_a_stranger_is_refused(llama):
    inside, leave, want = threading.Barrier(3), threading.Event(), alone(llama, .5)
    def user(T):
        with steering(llama, TWIST, layer=LAYER, T=T):
            inside.wait(30)
            answer(llama)
            leave.wait(30)
    threads = [threading.Thread(target=user, args=(T,)) for T in (-1., 1.)]
    for t in threads: t.start()
    inside.wait(30)
    try:
        for call in (lambda: answer(llama), lambda: llama(input_ids=ONE)):
            with pytest.raises(RuntimeError, match="steered by several threads or tasks at once.*open `with steering"): call()
        with steering(llama, TWIST, layer=LAYER, T=.5): assert torch.equal(answer(llama), want)
    finally:
        leave.set()
        for t in threads: t.join(60)
    answer(llama)
    assert clean(llama)


def test_two_models_at_once(llama):
    other = tiny_model("llama", seed=3)
    want = alone(llama, 1.), alone(other, -1.)
    with steering(llama, TWIST, layer=LAYER, T=1.), steering(other, TWIST, layer=LAYER, T=-1.):
        with ThreadPoolExecutor(2) as pool: got = list(pool.map(lambda m: [answer(m) for _ in range(4)], (llama, other)))
    assert all(torch.equal(a, w) for answers, w in zip(got, want) for a in answers)


def test_collecting_and_scoring_beside_a_steered_answer(llama, tok):
    texts = ["hi you", "a longer text than that", "who?"]
    want, stop = alone(llama, 1., max_new_tokens=20), threading.Event()
    clean_acts = collect_activations(llama, tok, texts, layers=[0, 2], progress=False)
    with steering(llama, TWIST, layer=LAYER, T=1.):
        steered_acts, score = collect_activations(llama, tok, texts, layers=[0, 2], progress=False), score_continuations(llama, tok, ["q"], [" me"])
    wrong = []
    def talk():
        while not stop.is_set():
            with steering(llama, TWIST, layer=LAYER, T=1.):
                if not torch.equal(answer(llama, max_new_tokens=20), want): wrong.append("answer")
    t = threading.Thread(target=talk)
    t.start()
    try:
        for _ in range(15):
            with steering(llama, TWIST, layer=LAYER, T=0.):  # its own, which changes nothing
                own = collect_activations(llama, tok, texts, layers=[0, 2], progress=False)
                if any(not torch.equal(own[l], clean_acts[l]) for l in (0, 2)): wrong.append("activations")
            with steering(llama, TWIST, layer=LAYER, T=1.):
                own = collect_activations(llama, tok, texts, layers=[0, 2], progress=False)
                if any(not torch.equal(own[l], steered_acts[l]) for l in (0, 2)) or not torch.equal(score_continuations(llama, tok, ["q"], [" me"]), score): wrong.append("steered")
    finally:
        stop.set()
        t.join(60)
    assert wrong == []


# ---- calls that outlive their block

class Held(transformers.generation.streamers.BaseStreamer):
    "A reader who stops after some tokens, until told to go on"
    def __init__(self, tokens=4): self.left, self.reached, self.go = tokens + 1, threading.Event(), threading.Event()
    def end(self): pass
    def put(self, value):
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.go.wait(60)


def test_a_stream_keeps_what_it_began_with(model):
    want, plain, got, held = alone(model, 1., max_new_tokens=12), answer(model, max_new_tokens=12), [], Held()
    with steering(model, TWIST, layer=LAYER, T=1.) as h:
        t = threading.Thread(target=lambda: got.append(answer(model, max_new_tokens=12, streamer=held)))
        t.start()
        assert held.reached.wait(60)
    assert is_steered(model) and not clean(model)  # one call needs them still
    assert torch.equal(answer(model, max_new_tokens=12), plain)  # but no other gets them
    other = alone(model, -1., max_new_tokens=12)
    held.go.set()
    t.join(60)
    assert torch.equal(got[0], want) and not torch.equal(other, want) and h.applied == 12 and not is_steered(model) and clean(model)


def test_an_abandoned_stream_locks_nobody_out(llama):
    want, held = alone(llama, 1.), Held(1)
    with steering(llama, TWIST, layer=LAYER, T=1.):
        t = threading.Thread(target=lambda: answer(llama, streamer=held), daemon=True)
        t.start()
        assert held.reached.wait(60)
        assert torch.equal(in_thread(answer, llama), want) and torch.equal(answer(llama), want)
    assert torch.equal(in_thread(alone, llama, 1.), want)
    held.go.set()
    t.join(60)


def test_whoever_removes_a_steering_within_its_own_call_means_it(llama):
    h = steering(llama, TWIST, layer=LAYER, T=1.)
    class Off:
        def __call__(self, ids, scores):
            if ids.shape[1] == 9: h.remove()
            return scores
    llama.generate(input_ids=ONE, attention_mask=MASK[:1], **GREEDY, logits_processor=[Off()])
    assert h.applied == 3 and clean(llama) and not is_steered(llama)


def test_a_call_that_fails_leaves_nothing(llama):
    class Broken:
        def __call__(self, ids, scores): raise ZeroDivisionError
    before = logits(llama)
    with pytest.raises(ZeroDivisionError):
        with steering(llama, TWIST, layer=LAYER, T=1.): answer(llama, logits_processor=[Broken()])
    with pytest.raises(Exception):
        with steering(llama, TWIST, layer=LAYER, T=1.): llama(input_ids=torch.tensor([[VOCAB + 5]]))
    assert clean(llama) and not is_steered(llama) and torch.equal(logits(llama), before)
    watch = ods.models.watch_of(llama)
    assert not watch.calls and watch.here.call is watch.here.single is None


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_while_another_thread_answers(llama):
    want, held = alone(llama, 1.).tolist(), Held(1)
    context = multiprocessing.get_context("fork")
    def child(q):
        with steering(llama, TWIST, layer=LAYER, T=1.): inside = answer(llama).tolist()
        q.put((inside, is_steered(llama)))
    with steering(llama, TWIST, layer=LAYER, T=1.):
        t = threading.Thread(target=lambda: answer(llama, streamer=held))
        t.start()
        assert held.reached.wait(60)
        q = context.Queue()
        p = context.Process(target=child, args=(q,))
        p.start()
        try: got, steered = q.get(timeout=60)
        finally:
            p.kill()
            held.go.set()
            t.join(60)
    assert steered and got != []  # the parent's block is open in the child too: both steer there
    with steering(llama, TWIST, layer=LAYER, T=1.): assert answer(llama).tolist() == want


def test_a_model_that_was_steered_can_be_freed():
    model = tiny_model("llama", num_hidden_layers=1)
    with steering(model, TWIST, layer=0, T=1.): answer(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_generate_of_transformers_comes_back(llama):
    own = transformers.GenerationMixin.generate
    with steering(llama, TWIST, layer=LAYER, T=1.):
        assert transformers.GenerationMixin.generate is not own and "generate" not in vars(llama)
        answer(llama)
    assert transformers.GenerationMixin.generate is own


def test_checkpointed_blocks_are_computed_again_as_they_were(llama):
    "Autograd runs a block twice, the second time outside any pass"
    model = tiny_model("llama", seed=5)
    def gradient(checkpointed):
        if checkpointed: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        else: model.gradient_checkpointing_disable()
        model.train().zero_grad()
        with steering(model, TWIST, layer=LAYER, T=1.):
            model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
        return decoder_layers(model)[0].mlp.up_proj.weight.grad.clone()
    torch.testing.assert_close(gradient(True), gradient(False))
    assert clean(model)


# ---- what is scored is steered

# ---- passes whose tokens are all steered alike

@pytest.fixture
def long(monkeypatch):
    "Blocks that were steered the long way round"
    blocks, edit = [], Steering._edit
    monkeypatch.setattr(Steering, "_edit", lambda self, key, *args: blocks.append(key) or edit(self, key, *args))
    return blocks

@pytest.mark.parametrize("obj", [TWIST, [TWIST, TWIST]], ids=["one", "two"])
def test_decoding_takes_the_short_way(model, obj, long, monkeypatch):
    def run():
        with steering(model, obj, layer=LAYER, T=.5) as handle: return answer(model, IDS), handle.applied
    want, applied = run()
    decoded = len(long)
    monkeypatch.setattr(Steering, "_all_alike", lambda self, tokens: False)
    again, n = run()
    assert torch.equal(again, want) and n == applied == len(IDS) * GREEDY["max_new_tokens"]
    assert len(long) - decoded == GREEDY["max_new_tokens"] * decoded > 0  # only the prompt took the long one


def test_who_asks_for_more_takes_the_long_way(llama, long):
    one, T = ONE[:, :1], torch.tensor(.5, requires_grad=True)
    def lengths(T=.5, **kw):
        with steering(llama, TWIST, layer=LAYER, T=T, **kw):
            long.clear()
            logits(llama, one, None)
            return len(long)
    assert lengths() == lengths(positions="all") == lengths(history="unsteered") == 0
    assert lengths(torch.tensor([.5])) == lengths(T) == 1
    with torch.autocast("cpu", torch.bfloat16): assert lengths() == 1
    with steering(llama, TWIST, layer=LAYER, T=T): llama(input_ids=one).logits.sum().backward()
    assert T.grad != 0 and len(long) == 2


@pytest.mark.parametrize("new", [0., torch.zeros(3)], ids=["number", "rows"])
def test_a_strength_assigned_within_a_pass_counts_from_the_next_block_on(llama, new):
    plain = logits(llama, IDS[:, :1], None)
    with steering(llama, TWIST, layer=LAYER, T=.5) as handle:
        assert not torch.equal(logits(llama, IDS[:, :1], None), plain)
        def assign(*_): handle.strength = new
        hook = decoder_layers(llama)[LAYER - 1].register_forward_hook(assign)
        assert torch.equal(logits(llama, IDS[:, :1], None), plain)
        hook.remove()


def test_an_edit_that_loses_a_row_is_named_while_decoding(llama):
    message = r"the edit at layer 1 was given \(3, \d+\) torch.float32 and returned \(2, "
    with pytest.raises(ValueError, match=message), steering(llama, SimpleNamespace(edits=lambda *_: {LAYER: lambda x, y, T: y[1:]}), T=1.): logits(llama, IDS[:, :1], None)


def loss(model, labels, **kw):
    with torch.no_grad(): return model(input_ids=IDS, labels=labels, **kw).loss

@pytest.mark.parametrize("mask", [MASK, RIGHT], ids=["full", "right"])
def test_labels_say_what_is_steered(model, mask):
    "The loss of a steered pass is the mean log-probability of the labels, as scored one by one"
    labels = torch.where(mask.bool(), IDS, -100)
    starts = torch.tensor([3, 2, 4])
    for row, q in enumerate(starts): labels[row, :q] = -100
    coded = [Encoded(ids[m.bool()].tolist(), int(q)) for ids, m, q in zip(IDS, mask, starts)]
    with steering(model, TWIST, layer=LAYER, T=1.): want = -score_encoded(model, coded)[0].sum() / (labels != -100).sum()
    with steering(model, TWIST, layer=LAYER, T=1.) as h: got = loss(model, labels, attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert h.applied == sum(len(e.ids) - e.answer + 1 for e in coded) and not torch.isclose(got, loss(model, labels, attention_mask=mask))


def test_labels_reach_compiled_code():
    model, labels = tiny_model("llama", seed=6), torch.where(torch.arange(7) < 3, -100, IDS)
    with steering(model, TWIST, layer=LAYER, T=1.) as h:
        own = loss(model, labels)
        torch._dynamo.reset()
        torch.testing.assert_close(loss(torch.compile(model, backend="eager"), labels), own)
    assert h.applied == 2 * 3 * 5


def test_all_labels_mean_all_tokens(llama):
    with steering(llama, TWIST, layer=LAYER, T=1.) as h: own = loss(llama, IDS)
    with steering(llama, TWIST, layer=LAYER, T=1., positions="all"): everywhere = loss(llama, IDS)
    assert torch.equal(own, everywhere) and h.applied == IDS.numel()
    with steering(llama, TWIST, layer=LAYER, T=1.) as h:
        loss(llama, torch.full_like(IDS, -100))
        logits(llama)
    assert h.applied == 3  # nothing was scored in the first pass, and the second has no labels


def test_labels_of_whole_rows_are_no_labels_of_tokens():
    model = transformers.LlamaForSequenceClassification(the_model("llama").config).eval()
    with steering(model, TWIST, layer=LAYER, T=1.) as h, torch.no_grad(): model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 1]))
    assert h.applied == 3


def test_the_evaluation_of_a_trainer_is_steered(llama, tmp_path):
    pytest.importorskip("accelerate")
    rows = [dict(input_ids=ids, labels=torch.where(torch.arange(7) < 3, -100, ids)) for ids in IDS]
    args = transformers.TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model=llama, args=args, eval_dataset=rows)
    plain = trainer.evaluate()["eval_loss"]
    with steering(llama, TWIST, layer=LAYER, T=1.) as h: steered = trainer.evaluate()["eval_loss"]
    with steering(llama, TWIST, layer=LAYER, T=1.): want = loss(llama, torch.stack([r["labels"] for r in rows])).item()
    assert steered == pytest.approx(want, rel=1e-5) and abs(steered - plain) > 1e-3 and h.applied == 3 * 5


def test_pads_that_end_a_row_are_known_without_a_mask(llama):
    ids = torch.where(RIGHT.bool(), IDS, 0)
    with steering(llama, TWIST, layer=LAYER, T=1.) as h, torch.no_grad(): bare = llama(input_ids=ids).logits
    with steering(llama, TWIST, layer=LAYER, T=1.): masked = logits(llama, ids, RIGHT)
    rows, last = torch.arange(3), RIGHT.sum(1) - 1
    torch.testing.assert_close(bare[rows, last], masked[rows, last])
    assert h.applied == 3


# ---- several documents in a row

def test_packed_documents_are_steered_at_their_ends(model):
    if model.config.model_type in ("mamba", "falcon", "gpt2"): pytest.skip("these mix packed documents")
    x, y = IDS[:1, :4], IDS[1:2]
    row, place = torch.cat([x, y], 1), torch.cat([torch.arange(4), torch.arange(7)])[None]
    with torch.no_grad():
        with steering(model, TWIST, layer=LAYER, T=1.): apart = model(input_ids=x).logits[0, -1], model(input_ids=y).logits[0, -1]
        with steering(model, TWIST, layer=LAYER, T=1.) as h: packed = model(input_ids=row, position_ids=place, use_cache=False).logits[0, [3, -1]]
    torch.testing.assert_close(packed, torch.stack(apart), rtol=1e-3, atol=1e-4)
    assert h.applied == 2


def test_packed_documents_with_labels(llama):
    x, y = IDS[:1, :5], IDS[1:2]
    row, place = torch.cat([x, y], 1), torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = row.clone()
    labels[0, [0, 1, 5, 6, 7]] = -100  # two prompt tokens, and three
    with steering(llama, TWIST, layer=LAYER, T=1.): want = -score_encoded(llama, [Encoded(x[0].tolist(), 2), Encoded(y[0].tolist(), 3)])[0].sum() / 7
    with torch.no_grad(), steering(llama, TWIST, layer=LAYER, T=1.) as h: got = llama(input_ids=row, position_ids=place, labels=labels, use_cache=False).loss
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert h.applied == 4 + 5


def test_packed_documents_are_refused_where_one_prompt_a_row_is_needed(llama):
    place = torch.cat([torch.arange(3), torch.arange(4)])[None].repeat(3, 1)
    for how in (dict(positions=torch.tensor([2, 2, 2])), dict(history="unsteered")):
        with pytest.raises(NotImplementedError, match="several documents are packed into one row"):
            with steering(llama, TWIST, layer=LAYER, T=1., **how): llama(input_ids=IDS, position_ids=place, use_cache=False)
    with steering(llama, TWIST, layer=LAYER, T=1., positions="all") as h: llama(input_ids=IDS, position_ids=place, use_cache=False)
    assert h.applied == IDS.numel()


def test_left_padded_rows_with_position_ids_are_not_packed(llama):
    place = (LEFT.cumsum(1) - 1).masked_fill(LEFT == 0, 1)
    assert (place[:, 1:] < place[:, :-1]).any()
    with steering(llama, TWIST, layer=LAYER, T=1.) as h, torch.no_grad(): llama(input_ids=IDS, attention_mask=LEFT, position_ids=place)
    assert h.applied == 3


# ---- caches that outlive a call

def first_logits(model, ids, **kw):
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **kw).logits[0]

@pytest.mark.parametrize("given", ["empty cache", "no cache"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_prefix_read_inside_the_block_is_no_prompt(llama, given, mask):
    with steering(llama, TWIST, layer=LAYER, T=1.), torch.no_grad():
        want = first_logits(llama, ONE)
        how = dict(past_key_values=transformers.DynamicCache(config=llama.config)) if given == "empty cache" else dict(use_cache=True)
        if mask: how["attention_mask"] = torch.ones(1, 4)
        cache = llama(input_ids=ONE[:, :4], **how).past_key_values
        for ids in (ONE, torch.cat([ONE[:, :4], IDS[1:2]], 1)):  # a copy for each prompt, as the recipe goes
            torch.testing.assert_close(first_logits(llama, ids, past_key_values=copy.deepcopy(cache)), first_logits(llama, ids))
        torch.testing.assert_close(first_logits(llama, ONE, past_key_values=cache), want)


def test_a_prefix_read_before_the_block(llama):
    with torch.no_grad(): cache = llama(input_ids=ONE[:, :4], use_cache=True).past_key_values
    with steering(llama, TWIST, layer=LAYER, T=1.) as h, torch.no_grad():
        want = llama(input_ids=ONE).logits[0, -1]
        rest = llama(input_ids=ONE[:, 4:], past_key_values=cache).logits[0, -1]  # a pass of one's own: its last token ends the prompt
    torch.testing.assert_close(rest, want)
    assert h.applied == 2


def test_an_answer_stays_steered_in_its_cache(llama):
    "A conversation goes on from what was said, not from what would have been said without steering"
    with steering(llama, TWIST, layer=LAYER, T=1.) as h:
        turn = llama.generate(input_ids=ONE, attention_mask=MASK[:1], **GREEDY, return_dict_in_generate=True)
        length, said = turn.past_key_values.get_seq_length(), h.applied
        assert length == 12 and said == 6
        llama.generate(input_ids=torch.cat([turn.sequences, ONE], 1), past_key_values=turn.past_key_values, **GREEDY)
    assert h.applied == said + 6  # nothing was taken back and computed again


def test_an_answer_goes_on_from_its_cache_as_if_it_had_not_been_interrupted(model):
    if model.config.model_type == "mamba": pytest.skip("transformers goes on from no recurrent state")
    with steering(model, TWIST, layer=LAYER, T=1.):
        whole = answer(model, max_new_tokens=8)
        half = model.generate(input_ids=ONE, attention_mask=MASK[:1], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        rest = model.generate(input_ids=half.sequences, past_key_values=half.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(rest[0, 7:], whole)


def test_a_prefix_that_cannot_be_taken_back_is_refused(llama):
    with steering(llama, TWIST, layer=LAYER, T=1.), torch.no_grad():
        cache = transformers.StaticCache(config=llama.config, max_cache_len=32)
        llama(input_ids=ONE[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="fill it before steering begins"): first_logits(llama, ONE, past_key_values=cache)


# ---- guidance

@pytest.mark.parametrize("n", [1, 3, 7, 12])
@pytest.mark.parametrize("cache", [True, False])
def test_a_negative_prompt_is_steered_from_its_own_end(llama, n, cache):
    "Against guidance by hand: two texts, each steered from its own last token on"
    negative = torch.randint(4, VOCAB, (1, n), generator=torch.Generator().manual_seed(n))
    if n == 12: negative[:, :7] = ONE  # it begins like the prompt
    scale, own, other = 1.5, ONE, negative
    for _ in range(6):
        with torch.no_grad(), steering(llama, TWIST, layer=LAYER, T=1., positions=torch.tensor([7])): a = llama(input_ids=own).logits[:, -1]
        with torch.no_grad(), steering(llama, TWIST, layer=LAYER, T=1., positions=torch.tensor([n])): b = llama(input_ids=other).logits[:, -1]
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        token = (scale * (a - b) + b).argmax(-1, keepdim=True)
        own, other = torch.cat([own, token], 1), torch.cat([other, token], 1)
    with steering(llama, TWIST, layer=LAYER, T=1.) as h:
        got = answer(llama, guidance_scale=scale, negative_prompt_ids=negative, negative_prompt_attention_mask=torch.ones_like(negative), use_cache=cache)
    assert torch.equal(got, own[0, 7:]) and h.applied == 2 * (6 if cache else 21)


# ---- what is steered and what is called

def test_the_inner_module_may_be_steered(model):
    want = alone(model, 1.)
    inner = model.get_decoder() if model.config.model_type != "mamba" else model.backbone
    for kw in (dict(), dict(use_cache=False)): 
        with steering(inner, TWIST, layer=LAYER, T=1.): assert torch.equal(answer(model, **kw), want), kw


def test_adapters_and_their_base_are_one_model(tok):
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", seed=2)
    wrapper = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = dict(input_ids=ONE, attention_mask=MASK[:1])
    answers = []
    for steered in (wrapper, base, base.model):
        for called in (wrapper, base):
            for cache in (True, False):
                with steering(steered, TWIST, layer=LAYER, T=1.): answers.append(called.generate(**ids, **GREEDY, use_cache=cache)[0].tolist())
    assert len(answers) == 12 and all(a == answers[0] for a in answers) and clean(wrapper)
    labels = torch.where(torch.arange(7) < 3, -100, IDS)
    with torch.no_grad(), steering(wrapper, TWIST, layer=LAYER, T=1.): of_wrapper = wrapper(input_ids=IDS, labels=labels).loss
    with torch.no_grad(), steering(base, TWIST, layer=LAYER, T=1.): assert torch.equal(base(input_ids=IDS, labels=labels).loss, of_wrapper)


def virtual(peft, kind):
    common = dict(task_type="CAUSAL_LM", num_virtual_tokens=5)
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig, "p": peft.PromptEncoderConfig}[kind](**common, **({"encoder_hidden_size": 16} if kind == "p" else {}))
    base = tiny_model("llama", seed=2)
    return base, peft.get_peft_model(base, config).eval()

@pytest.mark.parametrize("kind", ["prompt", "prefix", "p"])
def test_trained_vectors_before_the_prompt_are_refused(tok, kind):
    base, wrapper = virtual(pytest.importorskip("peft"), kind)
    calls = [lambda: steering(wrapper, TWIST, layer=LAYER, T=1.), lambda: collect_activations(wrapper, tok, ["hi"], layers=0, progress=False),
             lambda: score_continuations(wrapper, tok, ["q"], [" me"])]
    def base_steered_wrapper_called():
        with steering(base, TWIST, layer=LAYER, T=1.): wrapper.generate(input_ids=ONE, attention_mask=MASK[:1], **GREEDY)
    for call in (*calls, base_steered_wrapper_called):
        with pytest.raises(ValueError, match="puts trained vectors before every prompt.*get_base_model"): call()
    assert clean(base)
    with steering(base, TWIST, layer=LAYER, T=1.): answer(base)  # the way out


class ValueHead(nn.Module):
    "As libraries for reinforcement learning wrap a model"
    def __init__(self, model): super().__init__(); self.pretrained_model, self.v_head, self.config = model, nn.Linear(WIDTH, 1), model.config
    def forward(self, **kw): return self.pretrained_model(**kw), None
    def generate(self, **kw): return self.pretrained_model.generate(**kw)

class Engine(nn.Module):
    "As trainers for many devices wrap a model"
    def __init__(self, model): super().__init__(); self.module = model
    def forward(self, **kw): return self.module(**kw)

@pytest.mark.parametrize("wrap", [nn.DataParallel, ValueHead, Engine, lambda m: nn.DataParallel(ValueHead(m)), lambda m: torch.compile(nn.DataParallel(m), backend="eager")])
def test_wrappers_are_looked_through(llama, tok, wrap):
    wrapped, want = wrap(llama), alone(llama, 1.)
    assert unwrapped(wrapped) is llama and len(decoder_layers(wrapped)) == LAYERS
    with steering(wrapped, TWIST, layer=LAYER, T=1.) as h:
        assert torch.equal(answer(llama), want)
        wrapped(input_ids=ONE)
        assert h.applied == 7
    assert torch.equal(collect_activations(wrapped, tok, ["hi"], layers=0, progress=False)[0], collect_activations(llama, tok, ["hi"], layers=0, progress=False)[0])


def test_hidden_states_show_what_the_next_block_gets(model):
    if model.config.model_type in ("mamba",): pytest.skip("lists states in another order")
    def listed(first):
        fresh = copy.deepcopy(model)
        with torch.no_grad():
            if first: fresh(input_ids=IDS, output_hidden_states=True)
            own = fresh.get_decoder() and decoder_layers(fresh)[LAYER].register_forward_hook(lambda *_: None)
            with steering(fresh, TWIST, layer=LAYER, T=1.): states = fresh(input_ids=IDS, output_hidden_states=True).hidden_states
            own.remove()
        return states
    with torch.no_grad(): plain = copy.deepcopy(model)(input_ids=IDS, output_hidden_states=True).hidden_states
    for first in (False, True):
        states = listed(first)
        changed = (states[LAYER + 1] != plain[LAYER + 1]).any(-1)
        assert changed[:, -1].all() and not changed[:, :-1].any(), first
        torch.testing.assert_close(states[LAYER + 1][:, -1], TWIST.move(plain[LAYER + 1][:, -1], torch.ones(())))


def test_blocks_with_several_streams_are_refused(tok):
    if not hasattr(transformers, "Gemma3nForCausalLM"): pytest.skip("this transformers has no Gemma 3n")
    config = transformers.Gemma3nTextConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
                                            vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4, num_kv_shared_layers=0, layer_types=["full_attention"]*2,
                                            activation_sparsity_pattern=[0.]*2, sliding_window=16)
    model = transformers.Gemma3nForCausalLM(config).eval()
    with pytest.raises(ValueError, match="several streams of activations.*Gemma 3n"): collect_activations(model, tok, ["hi"], layers=0, progress=False)
    with pytest.raises(ValueError, match="several streams of activations.*Gemma 3n"), steering(model, TWIST, layer=0, T=1.): model(input_ids=ONE)
    assert clean(model)


# ---- what is given

@pytest.mark.parametrize("layer", [np.int64(1), np.argmax([.1, .9, .3]), torch.tensor(1), np.array(1)], ids=repr)
def test_integers_of_other_libraries_are_layers(llama, tok, layer):
    want = alone(llama, 1.)
    with steering(llama, TWIST, layer=layer, T=1.): assert torch.equal(answer(llama), want)
    one, many = (collect_activations(llama, tok, ["hi"], layers=ls, progress=False) for ls in (layer, np.array([0, 1])))
    assert torch.equal(one[1], many[1]) and [*many] == [0, 1]

@pytest.mark.parametrize("layer", [1., "1", True, np.float64(1), torch.tensor(1.), None])
def test_what_is_no_layer(llama, layer):
    with pytest.raises((TypeError, ValueError), match="layer|integer|say which block"): steering(llama, TWIST, layer=layer if layer is not None else "", T=1.)

@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e39, {"share": float("nan")}, torch.tensor([0., float("inf")])])
def test_strengths_that_are_not_finite(llama, bad):
    caa = ods.CAA().fit(torch.ones(3, WIDTH), torch.zeros(3, WIDTH))
    with pytest.raises(ValueError, match="finite"): steering(llama, caa, layer=1, strength=bad)
    assert clean(llama)
    h = steering(llama, caa, layer=1, T=1.)
    with pytest.raises(ValueError, match="finite"): h.strength = bad
    h.remove()

def test_strengths_that_half_precision_cannot_hold():
    half = tiny_model("llama", seed=1).half()
    caa = ods.CAA().fit(2 * torch.ones(3, WIDTH), torch.ones(3, WIDTH))
    for bad in (1e6, {"share": 1e6}, torch.tensor([0., 1e6])):
        with pytest.raises(ValueError, match="beyond 65504, where float16 ends"): steering(half, caa, layer=1, strength=bad)
    with steering(half, caa, layer=1, T=100.) as h:
        with pytest.raises(ValueError, match="float16 ends"): h.strength = 1e6
        assert logits(half).isfinite().all()
    assert clean(half)

@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_batches_of_no_size(llama, tok, bad):
    for call in (lambda: generate_text(llama, tok, ["hi"], batch_size=bad), lambda: score_continuations(llama, tok, ["q"], ["a"], batch_size=bad),
                 lambda: collect_activations(llama, tok, ["hi"], layers=0, batch_size=bad, progress=False), lambda: length_batches([1, 2], bad)):
        with pytest.raises(ValueError, match="batch_size must be 1 or more"): call()

def test_half_a_surrogate_pair_is_named(tok):
    for text in ("bad \ud800", ("fine", "bad \udfff"), [{"role": "user", "content": "bad \ud912"}]):
        with pytest.raises(ValueError, match=r"text 1 holds half a surrogate pair, '.ud\w+'"): encode(tok, ["fine", text])
    assert encode(tok, ["fine \U0001f600"])

def test_columns_and_tables(llama, tok):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(dict(text=["rude", "kind one", "kind two"], label=[0, 1, 1]))
    want = collect_activations(llama, tok, ["kind one", "kind two"], layers=0, progress=False)[0]
    for texts in (table[table.label == 1]["text"], table["text"].to_numpy()[1:], tuple(table["text"][1:])):
        assert torch.equal(collect_activations(llama, tok, texts, layers=0, progress=False)[0], want)
        assert generate_text(llama, tok, texts, **GREEDY) == generate_text(llama, tok, list(texts), **GREEDY)
    for bad in (table, table[["text"]], table[["text"]].to_numpy()):
        with pytest.raises(TypeError, match="with several columns: give one"): encode(tok, bad)

def test_a_processor_has_a_tokenizer(llama, tok):
    class Processor:
        tokenizer, chat_template = copy.copy(tok), tok.chat_template
        def __call__(self, images=None, text=None): raise ValueError("Incorrect image source")
    Processor.tokenizer.chat_template = None
    p, texts = Processor(), ["hi you", [{"role": "user", "content": "who?"}]]
    assert encode(p, texts) == encode(tok, texts) and pad_id(p) == pad_id(tok) and text_tokenizer(tok) is tok
    assert generate_text(llama, p, texts, **GREEDY) == generate_text(llama, tok, texts, **GREEDY)
    assert Processor.tokenizer.chat_template is None  # not written to

@pytest.mark.filterwarnings("ignore")
def test_the_fingerprint_of_quantised_weights(tok, tmp_path):
    if "fbgemm" not in torch.backends.quantized.supported_engines and "onednn" not in torch.backends.quantized.supported_engines: pytest.skip("no quantised engine")
    quantised = lambda seed: torch.ao.quantization.quantize_dynamic(tiny_model("llama", seed=seed), {nn.Linear}, dtype=torch.qint8)
    a, b, c = quantised(0), quantised(0), quantised(1)
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    acts = [collect_activations(a, tok, ["hello"], layers=[1], progress=False, cache_dir=tmp_path)[1] for _ in range(2)]
    assert torch.equal(*acts) and len(list(tmp_path.rglob("*.safetensors"))) == 1

def test_the_mean_leaves_out_attention_sinks(tok):
    "A first token whose norm is a hundred times that of the others does not set the scale"
    model = tiny_model("llama", seed=4)
    def sink(module, args, out):
        out = out.clone()
        out[:, 0] *= 1000
        return out
    hook = decoder_layers(model)[0].register_forward_hook(sink)
    texts = ["hi you", "who is it?"]
    every = collect_activations(model, tok, texts, layers=0, positions="all", progress=False)[0]
    mean = collect_activations(model, tok, texts, layers=0, positions="mean", progress=False)[0]
    hook.remove()
    for a, m in zip(every, mean):
        assert a[0].norm() > 100 * a[1:].norm(dim=1).max()
        torch.testing.assert_close(m, a[1:].mean(0))
    plain = collect_activations(model, tok, texts, layers=0, positions="all", progress=False)[0]
    torch.testing.assert_close(collect_activations(model, tok, texts, layers=0, positions="mean", progress=False)[0], torch.stack([a.mean(0) for a in plain]))

def test_the_sink_of_a_pretrained_model(smollm2):
    texts = ["The film was wonderful and I loved every minute of it", "What an awful rainy day for a walk in the mud"]
    how = dict(layers=14, progress=False)
    every, mean = (collect_activations(*smollm2, texts, positions=p, **how)[14] for p in ("all", "mean"))
    for a, m in zip(every, mean):
        assert a[0].norm() > 100 * a[1:].norm(dim=1).median()
        torch.testing.assert_close(m, a[1:].mean(0))

def test_a_certificate_takes_a_steerer(llama):
    from odesteer.barrier import certificate
    g = torch.Generator().manual_seed(0)
    pos, neg = torch.randn(40, 8, generator=g) + .5, torch.randn(40, 8, generator=g)
    steerer = ods.ODESteer(n_components=64).fit(pos, neg)
    path = steerer.trajectory(neg, T=1.) if hasattr(steerer, "trajectory") else ods.trajectory(steerer, neg, T=1.)
    path = path if torch.is_tensor(path) else path[0]
    own, of_barrier = certificate(steerer, path), certificate(steerer.barrier, path)
    assert torch.equal(own.h, of_barrier.h)
    with pytest.raises(TypeError, match="got CAA, which has none"): certificate(ods.CAA().fit(pos, neg), path)
