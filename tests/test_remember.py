"An edit may remember the last prompt token until the answer is finished"
import pytest
import torch

import odesteer as ods
from odesteer.euler import Edit

from .archs import VOCAB, WIDTH, tiny_model, tiny_tokenizer

W, V = (torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
IDS = torch.randint(4, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
GREEDY = dict(max_new_tokens=6, do_sample=False)


class Recaller:
    "Moves every token by something of its own and something of the last prompt token"
    def __init__(self): self.calls = []
    def edits(self, model, layer, strength):
        def edit(x, y, T, kept): return y + (T[..., None] * (torch.tanh(y @ W) + kept)).to(y.dtype)
        def remember(q):
            self.calls.append(q.clone())
            return 2 * torch.sin(q.float() @ V)
        return {layer: Edit(edit, remember)}


def reference(model, ids, T=1., n=6):
    "One prompt, no cache, one token at a time, with a hook of our own"
    q = len(ids)
    def hook(m, a, out):
        y = out if torch.is_tensor(out) else out[0]
        y = torch.cat([y[:, :q - 1], y[:, q - 1:] + T * (torch.tanh(y[:, q - 1:] @ W) + 2 * torch.sin(y[:, q - 1:q] @ V))], 1)
        return y if torch.is_tensor(out) else (y, *out[1:])
    handle = ods.decoder_layers(model)[1].register_forward_hook(hook)
    ids = ids[None]
    with torch.no_grad():
        for _ in range(n): ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    return ids[0, q:]


@pytest.mark.parametrize("arch", ["llama", "falcon", "mamba", "gemma2"])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_answers_are_those_of_single_prompts(arch, cache):
    model, r = tiny_model(arch), Recaller()
    with ods.steering(model, r, layer=1, T=1.): out = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=cache, **GREEDY)[:, 7:]
    assert torch.equal(out, torch.stack([reference(model, row) for row in IDS])) and len(r.calls) == 1 and r.calls[0].shape == (3, WIDTH)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3, num_return_sequences=3), dict(cache_implementation="static"), dict(prefill_chunk_size=3)], ids=str)
def test_left_padding_beams_and_caches(how):
    model, r = tiny_model("llama"), Recaller()
    with ods.steering(model, r, layer=1, T=torch.tensor([1., .5, 2.])): out = model.generate(IDS, attention_mask=LEFT, **{**GREEDY, **how})[:, 7:]
    for i in range(3):
        one = IDS[i:i + 1, LEFT[i].bool()]
        with ods.steering(model, Recaller(), layer=1, T=[1., .5, 2.][i]): alone = model.generate(one, attention_mask=torch.ones_like(one), **{**GREEDY, **{k: v for k, v in how.items() if k.startswith("num")}})[:, one.shape[1]:]
        k = how.get("num_beams", 1)
        assert torch.equal(out[i * k:(i + 1) * k], alone)
        if k == 1: assert torch.equal(alone[0], reference(model, one[0], [1., .5, 2.][i]))
    assert len(r.calls) == 1


def test_every_call_remembers_anew():
    model, r = tiny_model("llama"), Recaller()
    with ods.steering(model, r, layer=1, T=1.):
        both = [model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[:, 7:] for ids in (IDS, IDS.flip(0), IDS[:, 1:].repeat(1, 2)[:, :7])]
    assert len(r.calls) == 3 and torch.equal(both[0], both[1].flip(0))
    assert torch.equal(both[2], torch.stack([reference(model, row) for row in IDS[:, 1:].repeat(1, 2)[:, :7]]))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_scores_agree_with_single_texts_and_see_the_last_prompt_token(positions):
    model, tok = tiny_model("llama"), tiny_tokenizer()
    prompts, answers, r = ["what is it?", "who", "where is the fish?"], [" a bird.", " nobody at all.", " x"], Recaller()
    with ods.steering(model, r, layer=1, T=1., positions=positions): together = ods.score_continuations(model, tok, prompts, answers)
    with ods.steering(model, Recaller(), layer=1, T=1., positions=positions): apart = torch.cat([ods.score_continuations(model, tok, [p], [a]) for p, a in zip(prompts, answers)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    states = ods.collect_activations(model, tok, list(zip(prompts, answers)), layers=1, positions="prompt", progress=False)[1]
    got = torch.cat(r.calls)
    assert all(any(torch.allclose(s, g, atol=1e-4) for g in got) for s in states)


def test_all_positions_in_generation_see_the_last_prompt_token():
    model, r = tiny_model("llama"), Recaller()
    with ods.steering(model, r, layer=1, T=1., positions="all"): model.generate(IDS, attention_mask=LEFT, **GREEDY)
    last = Recaller()
    with ods.steering(model, last, layer=1, T=1.): model.generate(IDS, attention_mask=LEFT, **GREEDY)
    assert len(r.calls) == 1
    torch.testing.assert_close(r.calls[0], last.calls[0])


def test_truthflow_adds_the_correction_of_the_question():
    model, tok, g = tiny_model("llama"), tiny_tokenizer(), torch.Generator().manual_seed(0)
    pos, neg, source = (torch.randn(30, WIDTH, generator=g) for _ in range(3))
    s = ods.TruthFlow(epochs=2).fit(pos, neg, source=source)
    seen = []
    with ods.steering(model, s, layer=1, T=.7):
        handle = ods.decoder_layers(model)[1].register_forward_hook(lambda m, a, out: seen.append((out if torch.is_tensor(out) else out[0])[:, -1]))
        hook = ods.decoder_layers(model)[1].register_forward_hook
        model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
        handle.remove()
    plain = []
    handle = ods.decoder_layers(model)[1].register_forward_hook(lambda m, a, out: plain.append((out if torch.is_tensor(out) else out[0])[:, -1]))
    with torch.no_grad(): model(IDS)
    handle.remove()
    torch.testing.assert_close(seen[0], s.steer(plain[0], T=.7), rtol=1e-4, atol=1e-4)
    per_token = ods.TruthFlow(epochs=2).fit(pos, neg)
    assert per_token.edits(model, 1, 1.)[1].remember is None and s.edits(model, 1, 1.)[1].remember is not None


def test_a_plain_function_may_remember_too():
    class Functions(Recaller):
        def edits(self, model, layer, strength):
            edit, = super().edits(model, layer, strength).values()
            def function(*args): return edit(*args)
            function.remember = edit.remember
            return {layer: function}
    model, parts = tiny_model("llama"), (Recaller(), Functions())
    answers = []
    for part in parts:
        with ods.steering(model, part, layer=1, T=1.): answers.append(model.generate(IDS, attention_mask=LEFT, **GREEDY))
    assert torch.equal(*answers) and all(len(part.calls) == 1 for part in parts)
