"Jacobians of blocks at the last token: against autograd on the whole sequence and finite differences, on every architecture; files that survive kills and damage"
import contextlib

import pytest
import torch
from torch import nn

import odesteer as ods
from odesteer.linear import FrozenCache, Jacobians, block_inputs, block_map, contexts, mean_jacobian, mean_jvp, mean_vjp
from odesteer.euler import CAA
from odesteer.hooks import steering
from odesteer.models import decoder_layers
from tests.archs import CONFIGS, LAYERS, WIDTH, tiny_model, tiny_tokenizer

TEXTS = ["hello there, this is a text of many more than sixteen tokens.", " a short one", "q: is it so?\na: yes"]
NAMED = ["llama", "gemma2", "gemma3_text", "qwen2", "gpt2", "falcon", "mixtral", "bloom", "deepseek_v3", "gpt_oss", "mamba"]  # mamba has no keys and values


@pytest.fixture(scope="module")
def tok(): return tiny_tokenizer()

def precise(arch):
    "In float64 where the architecture can: grouped products of experts cannot"
    return tiny_model(arch) if arch in ("mixtral", "gpt_oss", "deepseek_v3") else tiny_model(arch).double()

def rows(n, seed=0, dtype=torch.float32): return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)

def last_row(model, tok, text, t):
    "Block t as the whole model runs it: the last token's output as a function of the last token's input, and that input; made with nothing of the library but the list of blocks"
    block, kept = decoder_layers(model)[t], {}
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: kept.update(args=args, kwargs=dict(kwargs)), with_kwargs=True)
    try:
        with torch.no_grad(): model(torch.tensor([tok(text)["input_ids"]]), use_cache=False)
    finally: handle.remove()
    args, kwargs = kept["args"], kept["kwargs"]
    h = args[0] if args else kwargs.pop("hidden_states")
    def g(x):
        y = block(torch.cat([h[:, :-1], x[None, None]], 1), *args[1:], **kwargs)
        return (y if isinstance(y, torch.Tensor) else y[0])[0, -1]
    return g, h[0, -1].detach()

def dense(model, tok, texts, t):
    return sum(torch.autograd.functional.jacobian(*last_row(model, tok, text, t)) for text in texts) / len(texts)

def distance(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("arch", NAMED)
def test_mean_jacobian_is_that_of_the_whole_sequence(arch, tok):
    model = precise(arch)
    seen = contexts(model, tok, TEXTS)
    assert all(len(prefix) == (1 if arch == "mamba" else 2) for c in seen for prefix in c.prefix)
    rows = []
    decoder_layers(model)[2].register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)
    mean_jacobian(model, seen, 2)
    assert sum(rows) < WIDTH and rows[-len(seen) + 1:] == [1] * (len(seen) - 1)  # one run forward for a text, whatever the width: no copy for each row
    for t in (0, 1, LAYERS - 1):  # in gemma2 and gpt_oss every other block has a window of 16 tokens, which the first text exceeds
        A = mean_jacobian(model, seen, t, chunk=7)
        want = dense(model, tok, TEXTS, t)
        assert A.dtype == model.dtype and distance(A, want) < 1e-5  # norms and softmax of some architectures are float32 whatever the weights
        assert distance(want, torch.eye(WIDTH).to(want)) > .1  # there is something to get wrong


@pytest.mark.parametrize("arch", sorted(set(CONFIGS) - set(NAMED)))
def test_every_architecture(arch, tok):
    model = tiny_model(arch)
    A = mean_jacobian(model, contexts(model, tok, TEXTS[:1]), 1)
    assert distance(A, dense(model, tok, TEXTS[:1], 1)) < 1e-4


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "granite"])
def test_attention_that_is_written_out(arch, tok):
    model = tiny_model(arch, attn_implementation="eager").double()
    seen, Z = contexts(model, tok, TEXTS), rows(4, dtype=torch.float64)
    want = dense(model, tok, TEXTS, 1)
    assert distance(mean_vjp(model, seen, 1, Z), Z @ want) < 1e-6 and distance(mean_jvp(model, seen, 1, Z), Z @ want.T) < 1e-6


@pytest.mark.parametrize("gate", [lambda x: 1 + x.tanh(), lambda x: x.exp() / x.exp().detach()], ids=["another value", "the same value"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_old_keys_that_are_no_constants(gate, attention, tok):
    "What attention reads of earlier tokens may depend on this one: then it is not enough that the values are those of the cache"
    model = tiny_model("llama", attn_implementation=attention).double()
    class Gated(type(decoder_layers(model)[1].self_attn)):
        def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
            by = gate(hidden_states[:, -1:].mean(-1, keepdim=True))[:, None]
            class Cache:
                def update(_, *new, **more): return tuple(x * by for x in past_key_values.update(*new, **more))
            return super().forward(hidden_states, *args, past_key_values=past_key_values and Cache(), **kwargs)
    decoder_layers(model)[1].self_attn.__class__ = Gated
    seen = contexts(model, tok, TEXTS[:1])
    f, x = block_map(model, seen[0], 1), seen[0].states[1]
    want = torch.autograd.functional.jacobian(lambda x: f(x[None])[0], x)
    assert len(seen[0].prefix[1]) == 2 and distance(mean_jacobian(model, seen, 1), want) < 1e-6 and distance(mean_jvp(model, seen, 1, torch.eye(WIDTH).double()), want.T) < 1e-6


def test_attention_with_linear_biases(tok):
    model = tiny_model("falcon", alibi=True)
    assert distance(mean_jacobian(model, contexts(model, tok, TEXTS), 1), dense(model, tok, TEXTS, 1)) < 1e-4


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2", "gpt2", "falcon", "mixtral", "mamba"])
def test_products_are_those_of_the_matrix_and_of_finite_differences(arch, tok):
    model = precise(arch)
    seen, Z, t = contexts(model, tok, TEXTS), rows(5, dtype=model.dtype), 2
    A = mean_jacobian(model, seen, t)
    assert distance(mean_jvp(model, seen, t, Z, chunk=2), Z @ A.T) < 1e-5
    assert distance(mean_vjp(model, seen, t, Z, chunk=2), Z @ A) < 1e-5
    maps, eps = [block_map(model, c, t) for c in seen], 1e-4 if model.dtype == torch.float64 else 1e-2
    with torch.no_grad(): moved = sum((f(c.states[t] + eps*Z) - f(c.states[t] - eps*Z)) / (2*eps) for f, c in zip(maps, seen)) / len(seen)
    assert distance(moved, Z @ A.T) < 1e-3


def test_block_map_is_the_model(tok):
    model = tiny_model("gemma2").double()
    states = block_inputs(model, tok, TEXTS, batch_size=1)
    assert states.shape == (LAYERS + 1, len(TEXTS), WIDTH) and states.dtype == torch.float32
    for i, c in enumerate(contexts(model, tok, TEXTS)):
        assert distance(c.states.float(), states[:, i]) < 1e-6
        for t in range(LAYERS): assert distance(block_map(model, c, t)(c.states[t:t + 1])[0], c.states[t + 1]) < 1e-5
        elsewhere, (g, _) = rows(3, dtype=torch.float64), last_row(model, tok, TEXTS[i], 1)
        assert distance(block_map(model, c, 1)(elsewhere), torch.stack([g(z) for z in elsewhere])) < 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])
def test_text_of_one_token(arch):
    bare, model = tiny_tokenizer(bos=False), tiny_model(arch)
    seen = contexts(model, bare, ["a", "bc"])
    assert [len(c.prefix[0]) for c in seen] == ([1, 1] if arch == "mamba" else [1, 2])
    assert distance(mean_jacobian(model, seen, 1), dense(model, bare, ["a", "bc"], 1)) < 1e-4


def test_a_memory_beside_the_cache_is_found_out(tok):
    "Where keys and values are not all that a block remembers, it would not say again what the model said: the whole sequence is used instead"
    model = tiny_model("llama")
    class Remembers(type(decoder_layers(model)[2])):
        def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
            if hidden_states.shape[1] > 1: self.first = hidden_states[:, :1].detach()  # kept for the decoding steps, outside of the cache
            memory = 0 if isinstance(past_key_values, FrozenCache) else 5 * self.first
            return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs) + memory
    decoder_layers(model)[2].__class__ = Remembers
    seen = contexts(model, tok, TEXTS[:1])
    assert len(seen[0].prefix[0]) == 1 and distance(mean_jacobian(model, seen, 2), dense(model, tok, TEXTS[:1], 2)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "mixtral"])
def test_half_precision_is_differentiated_in_float32(arch, dtype, tok):
    model = tiny_model(arch).to(dtype)
    wide = tiny_model(arch).to(dtype).float()  # the same rounded weights
    seen, Z = contexts(model, tok, TEXTS), rows(4)
    A = mean_jacobian(model, seen, 1)
    assert A.dtype == torch.float32 and all(p.dtype == dtype for p in model.parameters())
    maps, eps = [block_map(model, c, 1) for c in seen], 1e-2
    moved = sum((f(c.states[1] + eps*Z) - f(c.states[1] - eps*Z)) / (2*eps) for f, c in zip(maps, seen)) / len(seen)
    assert distance(moved, Z @ A.T) < 5e-3  # no derivative of a map in half precision would pass
    assert distance(A, mean_jacobian(wide, contexts(wide, tok, TEXTS), 1)) < .1  # prefix and state are rounded, so not equal


class Int8Linear(nn.Module):
    "Weights as integers with a scale per row, multiplied by a function that has no rule for vmap or forward mode"
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, scale):
            ctx.save_for_backward(weight, scale)
            return x @ (weight * scale).T.to(x.dtype)
        @staticmethod
        def backward(ctx, grad):
            weight, scale = ctx.saved_tensors
            return grad @ (weight * scale).to(grad.dtype), None, None

    def forward(self, x): return self.Multiply.apply(x, self.weight, self.scale)

class Once(Int8Linear):
    "Backpropagation can pass, but not twice: `loudly` raises, else it says nothing of what it leaves out"
    loudly = True
    class Multiply(Int8Linear.Multiply):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad): return Int8Linear.Multiply.backward(ctx, grad)
    class Silent(Int8Linear.Multiply):
        @staticmethod
        def backward(ctx, grad): return Int8Linear.Multiply.backward(ctx, grad.detach())
    def forward(self, x): return (self.Multiply if self.loudly else self.Silent).apply(x, self.weight, self.scale)

@pytest.mark.parametrize("loudly", [True, False])
def test_kernels_that_are_differentiable_once_only(loudly, tok):
    model = tiny_model("llama")
    for block in decoder_layers(model): block.mlp.up_proj = Once(block.mlp.up_proj); block.mlp.up_proj.loudly = loudly
    seen, Z = contexts(model, tok, TEXTS), rows(4)
    assert distance(mean_jvp(model, seen, 2, Z), Z @ dense(model, tok, TEXTS, 2).T) < 1e-4


class Unbatched(Int8Linear):
    "Kernels that know nothing of a batch of gradients: one reads memory, one takes what it is given for something else, one is an operator without a rule"
    kind = "raises"
    class Raises(Int8Linear.Multiply):
        @staticmethod
        def backward(ctx, grad): return torch.from_numpy(grad.numpy().copy()) @ (ctx.saved_tensors[0] * ctx.saved_tensors[1]), None, None
    class Lies(Int8Linear.Multiply):
        @staticmethod
        def backward(ctx, grad):
            back, *none = Int8Linear.Multiply.backward(ctx, grad)
            return back / (2 if torch._C._functorch.is_batchedtensor(grad) else 1), *none
    class Loops(Int8Linear.Multiply):
        @staticmethod
        def backward(ctx, grad): return back(grad.reshape(-1, grad.shape[-1]), *ctx.saved_tensors).view(*grad.shape[:-1], -1), None, None
    def forward(self, x): return getattr(self, self.kind.title()).apply(x, self.weight, self.scale)

calls = []
@torch.library.custom_op("odesteer_tests::back", mutates_args=())
def back(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    calls.append(len(grad))
    return grad @ (weight * scale)

@pytest.mark.parametrize("kind", ["raises", "lies", "loops"])
def test_kernels_that_are_asked_row_by_row(kind, tok):
    model = tiny_model("llama")
    for block in decoder_layers(model): block.mlp.up_proj = Unbatched(block.mlp.up_proj); block.mlp.up_proj.kind = kind
    seen = contexts(model, tok, TEXTS)
    calls.clear()
    A = mean_jacobian(model, seen, 2)
    assert kind != "loops" or calls[-3:] == [WIDTH] * 3  # all rows at once, not one by one
    assert distance(A, dense(model, tok, TEXTS, 2)) < 1e-4
    Z = rows(4)
    assert distance(mean_jvp(model, seen, 2, Z), Z @ A.T) < 1e-4
    assert torch._C._functorch._is_vmap_fallback_enabled()  # what others use is as it was


def test_packed_weights_compute_as_they_are(tok):
    model = tiny_model("llama")
    for block in decoder_layers(model): block.mlp.up_proj, block.self_attn.q_proj = Int8Linear(block.mlp.up_proj), Int8Linear(block.self_attn.q_proj)
    seen, Z = contexts(model, tok, TEXTS), rows(4)
    A = mean_jacobian(model, seen, 2)
    assert distance(A, dense(model, tok, TEXTS, 2)) < 1e-4
    assert distance(mean_jvp(model, seen, 2, Z), Z @ A.T) < 1e-4
    half = model.to(torch.bfloat16)
    assert distance(mean_jacobian(half, contexts(half, tok, TEXTS), 2), A) < .1 and decoder_layers(half)[2].mlp.up_proj.weight.dtype == torch.int8


def test_model_is_left_as_it_was(tok):
    model = tiny_model("llama", attention_dropout=.5)
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, torch.tensor([tok(TEXTS[0])["input_ids"]])
    with torch.no_grad(): logits = model(ids).logits
    model.train()
    decoder_layers(model)[0].mlp.eval()
    modes = [m.training for m in model.modules()]
    A, B = (mean_jacobian(model, contexts(model, tok, TEXTS), 1) for _ in range(2))
    with pytest.raises(ValueError, match="width|shape|size|expand|layer 9"): mean_jacobian(model, contexts(model, tok, TEXTS[:1]), 9)
    assert torch.equal(A, B) and [m.training for m in model.modules()] == modes  # no dropout, and every mode came back
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    with torch.no_grad(): assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradients_are_on_whatever_the_caller_set(mode, tok):
    model = tiny_model("llama")
    with mode(): A = mean_jacobian(model, contexts(model, tok, TEXTS), 1)
    assert not A.requires_grad and distance(A, dense(model, tok, TEXTS, 1)) < 1e-4


def test_long_texts_keep_their_first_token_and_their_end(tok):
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="longer than 8 tokens"): cut, short = contexts(model, tok, [TEXTS[0], "a"], max_tokens=8)
    assert cut.prefix[0][0].shape[-2] == 7 and short.prefix[0][0].shape[-2] == 1
    chat = [{"role": "user", "content": "x" * 60}]
    with pytest.warns(UserWarning, match="longer than 8 tokens"): cut = contexts(model, tok, [chat], max_tokens=8)[0]
    whole = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tok(whole, add_special_tokens=False)["input_ids"]
    with torch.no_grad(): first = model.get_input_embeddings()(torch.tensor(ids[-1]))
    assert torch.equal(cut.states[0], first) and whole.endswith("|a:")  # the header that the answer follows is still there


def test_errors_say_what_to_do(tok):
    model, x = tiny_model("llama"), rows(6)
    with pytest.raises(ValueError, match="at least one text"): contexts(model, tok, [])
    with pytest.raises(ValueError, match="at least one text"): mean_jacobian(model, [], 0)
    with pytest.raises(ValueError, match="at least one text"): Jacobians(model, tok, [])
    with pytest.raises(ValueError, match="layer 4 does not exist"): block_map(model, contexts(model, tok, TEXTS[:1])[0], 4)
    seen, jacobians = contexts(model, tok, TEXTS[:1]), Jacobians(model, tok, TEXTS[:1], progress=False)
    with steering(model, CAA().fit(x[:3], x[3:]), layer=0, strength=1.):
        for call in (lambda: contexts(model, tok, TEXTS), lambda: mean_jvp(model, seen, 0, x), lambda: jacobians[0], lambda: Jacobians(model, tok, TEXTS)):
            with pytest.raises(ValueError, match="being steered"): call()
        assert block_inputs(model, tok, TEXTS).shape[0] == LAYERS + 1  # states of a steered model are what feedback reads


def test_flash_attention_is_refused_where_derivatives_are_taken(tok):
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    jacobians = Jacobians(model, tok, TEXTS, progress=False)  # controllers that ask for none can be fitted
    for call in (lambda: jacobians[0], lambda: contexts(model, tok, TEXTS)):
        with pytest.raises(ValueError, match="attn_implementation='sdpa'"): call()


def test_states_of_a_steered_model(tok):
    model, u = tiny_model("llama"), rows(1)[0]
    steerer = CAA().fit(u[None] + rows(8), rows(8))
    free = block_inputs(model, tok, TEXTS)
    with steering(model, steerer, layer=1, strength=2.): moved = block_inputs(model, tok, TEXTS)
    assert torch.equal(moved[:2], free[:2]) and torch.allclose(moved[2] - free[2], 2 * u.expand(3, -1), atol=1e-4)


def files(folder): return sorted(folder.glob("*/layer_*.safetensors"))

def test_a_sequence_made_when_asked(tok):
    model = tiny_model("llama")
    jacobians = Jacobians(model, tok, TEXTS, progress=False)
    assert len(jacobians) == LAYERS and "3 texts" in repr(jacobians)
    for t, A in enumerate(jacobians): assert torch.equal(A, mean_jacobian(model, contexts(model, tok, TEXTS), t))
    assert torch.equal(jacobians[-1], list(reversed(jacobians))[0]) and torch.equal(jacobians[-1], jacobians[LAYERS - 1])
    with pytest.raises(IndexError): jacobians[LAYERS]


def test_files_are_found_again_and_only_for_the_same_weights_and_texts(tok, tmp_path, monkeypatch):
    model, made = tiny_model("llama"), []
    import odesteer.linear as linear
    monkeypatch.setattr(linear, "mean_jacobian", lambda m, c, t, *rest, real=linear.mean_jacobian: made.append(t) or real(m, c, t, *rest))
    def ask(*blocks, model=model, texts=TEXTS, **kw):
        jacobians = Jacobians(model, tok, texts, cache_dir=tmp_path, progress=False, **kw)
        return [jacobians[t] for t in blocks]
    first = ask(3, 2)
    second = ask(3, 2, 1)
    assert made == [3, 2, 1] and torch.equal(first[0], second[0]) and len(files(tmp_path)) == 3  # goes on where the last one stopped
    ask(3, texts=TEXTS[:2])
    ask(3, model=tiny_model("llama", seed=1))
    assert made == [3, 2, 1, 3, 3]


def test_a_fit_that_was_stopped_goes_on_with_the_next_block(tok, tmp_path, monkeypatch, capfd):
    import odesteer.linear as linear
    model, real, made = tiny_model("llama").to(torch.bfloat16), linear.mean_vjp, []
    def dies(m, c, t, Z, chunk, progress):
        if t == 1: c = [c[0], None]  # in the middle of a block
        try: return real(m, c, t, Z, chunk, progress)
        except AttributeError: raise KeyboardInterrupt
    def fit(**kw): return ods.ALQR(n_jacobian=2).fit(model, tok, TEXTS, [" no.", "not so", "a dog"], **kw)
    monkeypatch.setattr(linear, "mean_vjp", dies)
    with pytest.raises(KeyboardInterrupt): fit(cache_dir=tmp_path)
    assert [f.name for f in files(tmp_path)] == ["layer_002.safetensors", "layer_003.safetensors"]
    first = capfd.readouterr()
    monkeypatch.setattr(linear, "mean_vjp", lambda m, c, t, *rest: made.append(t) or real(m, c, t, *rest))
    resumed, second = fit(cache_dir=tmp_path), capfd.readouterr()
    assert len(files(tmp_path)) == LAYERS and made == [1, 0]
    assert torch.equal(resumed.W_, fit(progress=False).W_) and capfd.readouterr() == ("", "")
    # one bar for all: blocks from the last to the first, 4 blocks of 2 texts, those on disk too
    assert first.out == second.out == "" and "block 1 (3 of 4)" in first.err and "8/8 [" not in first.err
    assert "block 0 (4 of 4)" in second.err and "8/8 [" in second.err and "/2 [" not in second.err


def test_a_kill_leaves_only_whole_files(tok, tmp_path, monkeypatch):
    import odesteer.linear as linear
    model, real = tiny_model("llama"), linear.mean_jacobian
    def dies(m, c, t, *rest):
        if t == 1: raise KeyboardInterrupt
        return real(m, c, t, *rest)
    monkeypatch.setattr(linear, "mean_jacobian", dies)
    with pytest.raises(KeyboardInterrupt): list(reversed(Jacobians(model, tok, TEXTS, cache_dir=tmp_path, progress=False)))
    kept = {f: f.stat().st_mtime_ns for f in files(tmp_path)}
    assert [f.name for f in kept] == ["layer_002.safetensors", "layer_003.safetensors"] and len(list(tmp_path.glob("*/*"))) == 2
    monkeypatch.setattr(linear, "mean_jacobian", real)
    again = list(Jacobians(model, tok, TEXTS, cache_dir=tmp_path, progress=False))
    assert all(torch.equal(A, B) for A, B in zip(again, Jacobians(model, tok, TEXTS, progress=False)))
    assert all(f.stat().st_mtime_ns == when for f, when in kept.items())


@pytest.mark.parametrize("harm", [lambda b: b[:-40], lambda b: b[:-4] + bytes(4), lambda b: b"", lambda b: b"nonsense"])
def test_a_damaged_file_is_made_again(harm, tok, tmp_path):
    model = tiny_model("llama")
    A = Jacobians(model, tok, TEXTS, cache_dir=tmp_path, progress=False)[1]
    file, = files(tmp_path)
    file.write_bytes(harm(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"): B = Jacobians(model, tok, TEXTS, cache_dir=tmp_path, progress=False)[1]
    assert torch.equal(A, B) and torch.equal(Jacobians(model, tok, TEXTS, cache_dir=tmp_path, progress=False)[1], A)


def test_the_bar_is_on_stderr_and_can_be_off(tok, capfd):
    model = tiny_model("llama")
    Jacobians(model, tok, TEXTS, progress=False)[1]
    assert capfd.readouterr() == ("", "")
    Jacobians(model, tok, TEXTS)[1]
    out, err = capfd.readouterr()
    assert out == "" and "block 1:" in err and "/3 [" in err


def test_micro_model_is_differentiated(tok):
    lm = ods.load_micro()
    pairs = [(p, " yes.") for p in ("Q: what is the colour of the givel?\nA:", "the givel is")]
    A = mean_jacobian(lm.model, contexts(lm.model, lm.tokenizer, pairs), 3)
    joined = ["Q: what is the colour of the givel?\nA: yes.", "the givel is yes."]
    assert A.shape == (128, 128) and distance(A, dense(lm.model, lm.tokenizer, joined, 3)) < 1e-4
