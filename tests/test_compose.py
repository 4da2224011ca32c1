"Steerers in combination: vectors and their arithmetic, several at one block, ablation, gates, strengths for a budget of divergence"
import copy
import itertools
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.barrier import LinearBarrier, ScoreBarrier
from odesteer.compose import Ablation, Calibrated, Gate, SteeringVector, as_vectors, strength_for_kl
from odesteer.control import effort

from .archs import LAYERS, VOCAB, WIDTH, tiny_model, tiny_tokenizer
from .project import rewrite
from .test_steerers import SMALL

D = WIDTH
G = torch.Generator().manual_seed(0)
POS, NEG, SOURCE = (torch.randn(40, D, generator=G) + shift for shift in (.5, 0., 0.))
IDS = torch.randint(4, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
GREEDY = dict(max_new_tokens=6, do_sample=False)
CONSTANT = ["caa", "iti", "repe", "random", "shuffled", "vector"]
STATE = ["odesteer", "step-odesteer", "mimic", "linact", "hpr", "recontrol", "truthflow", "ablation"]


def fit(name, shift=0., **kw):
    known = dict(source=SOURCE) if name == "truthflow" else {}
    if name == "recontrol": known = dict(sequences=[x[None] for x in torch.cat([POS, NEG])], rewards=torch.cat([torch.ones(40), torch.zeros(40)]))
    return ods.make_steerer(name, **{**SMALL.get(name, {}), **kw}).fit(POS + shift, NEG, **known)


@pytest.fixture(scope="module")
def made(): return {name: fit(name) for name in CONSTANT + STATE}


def close(a, b, tol=1e-4): torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# Vectors

def test_every_method_is_one_or_the_other():
    "A method that is added later says here which it is, by what `as_vectors` finds"
    assert {*CONSTANT, *STATE} >= {*ods.steerer_names("steerer"), *ods.steerer_names("placebo")}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("strength", [dict(T=1.5), dict(spread=.7), dict(share=.3), dict(T=torch.linspace(-1, 1, 40))], ids=str)
def test_a_constant_field_is_its_vector_bit_for_bit(made, name, strength):
    (layer, v), = as_vectors(made[name], layer=2).items()
    assert layer == 2 and type(v) is SteeringVector and v.about["layer"] == 2
    assert torch.equal(v.steer(NEG, **strength), made[name].steer(NEG, **strength))
    assert torch.equal(SteeringVector(made[name]).steer(NEG, **strength), made[name].steer(NEG, **strength))


@pytest.mark.parametrize("name", STATE)
def test_a_field_that_depends_on_the_state_is_no_vector_without_a_place(made, name):
    with pytest.raises(ValueError, match=rf"field of this {type(made[name]).__name__} depends on the activation.*at=activations"): as_vectors(made[name], layer=1)
    v = as_vectors(made[name], layer=1, at=NEG)[1]
    field = made[name].vector_field(NEG).mean(0)
    assert torch.cosine_similarity(v.vector, field, dim=0) > .9999
    if made[name].unit == "length": close(v.vector.norm(), torch.ones(()))
    else: close(v.vector, field)
    if name == "step-odesteer": close(as_vectors(made[name], layer=1, at=NEG[0])[1].steer(NEG[0], T=1.), made[name].steer(NEG[0], T=1.))  # a single activation, (d,)


def test_vectors_of_many_blocks(made):
    found = as_vectors({0: made["caa"], 3: made["odesteer"]}, at={3: NEG})
    assert list(found) == [0, 3] and [v.about["layer"] for v in found.values()] == [0, 3]
    both = as_vectors({2: [made["caa"], made["iti"]]})[2]
    close(both.vector_field(NEG), made["caa"].vector_field(NEG) + made["iti"].vector_field(NEG))
    with pytest.raises(TypeError, match="got list"): as_vectors({2: []})
    for bad, match in (({}, "at least one layer"), ({-1: made["caa"]}, "from 0 on; got -1"), ({True: made["caa"]}, "from 0 on")):
        with pytest.raises(ValueError, match=match): as_vectors(bad)
    with pytest.raises(ValueError, match="no layer= beside it"): as_vectors({0: made["caa"]}, layer=1)
    with pytest.raises(ValueError, match="to which block the vector belongs"): as_vectors(made["caa"])
    with pytest.raises(TypeError, match="got str"): as_vectors("caa")
    with pytest.raises(RuntimeError, match="not fitted"): as_vectors(ods.CAA(), layer=0)


def test_the_pushes_of_a_controller_are_vectors():
    model, tok = tiny_model("llama"), tiny_tokenizer()
    pid = ods.PIDAcT(n_texts=4).fit(model, tok, ["yes", "a yes", "oh yes", "yes."], ["no", "a no", "oh no", "no."], progress=False)
    found = as_vectors(pid)
    assert list(found) == list(range(LAYERS))
    with ods.steering(model, pid, T=.7): one = model(IDS).logits
    with ods.steering(model, found, T=.7): close(model(IDS).logits, one)
    assert found[1].strength_units == ("T", "share") and found[1].about["layer"] == 1
    with pytest.raises(ValueError, match="leave out layer="): as_vectors(pid, layer=1)
    spid = ods.SPID(n_texts=4).fit(model, tok, ["yes", "a yes"], ["no", "a no"], progress=False)
    with pytest.raises(ValueError, match="SPID adds depends on the state.*only PID-AcT"): as_vectors(spid)
    for wrong in (lambda: pid + fit("caa"), lambda: fit("caa") + pid, lambda: 2 * pid, lambda: -pid):
        with pytest.raises(TypeError, match="PIDAcT acts on many blocks.*block by block"): wrong()


BAD_VECTORS = {"a matrix": (torch.ones(2, 3), ValueError, r"shape \(d,\); got \(2, 3\)"), "nothing": ([], ValueError, "shape"), "a number": (3., ValueError, r"got \(\)"), "zero": (torch.zeros(D), ValueError, "zero"),
               "NaN": ([1., math.nan], ValueError, "NaN"), "a word": ("up", TypeError, "got str"), "truth values": (torch.ones(3) > 0, TypeError, "real numbers"), "complex": (torch.ones(3, dtype=torch.cfloat), TypeError, "real numbers")}


@pytest.mark.parametrize("bad", BAD_VECTORS)
def test_what_is_no_vector(bad):
    v, error, match = BAD_VECTORS[bad]
    with pytest.raises(error, match=match): SteeringVector(v)


def test_a_vector_of_ones_own(made, tmp_path):
    mine = torch.randn(D, generator=torch.Generator().manual_seed(4))
    for given in (mine, mine.numpy(), mine.tolist()):
        v = SteeringVector(given, layer=1)
        assert v.vector.dtype == torch.float32 and torch.equal(v.steer(NEG, T=2.), NEG + 2 * mine) and v.strength_units == ("T",) and v.default_strength == {"T": 1.}
        assert torch.equal(v.steer(NEG), NEG + mine)  # T = 1 where nothing is said
    assert SteeringVector(mine.double()).vector.dtype == torch.float64 and SteeringVector(mine.half()).vector.dtype == torch.float32
    kept = mine.clone()
    mine.zero_()
    assert torch.equal(SteeringVector(kept).vector, kept) and not torch.equal(v.vector, mine)  # a copy of its own
    for unit in ("spread", "share"):
        with pytest.raises(ValueError, match=f"made without activations, so {unit}= has no unit: give T=, or make it with like="): v.steer(NEG, **{unit: 1.})
        with pytest.raises(ValueError, match="made without activations"): v.edits(None, 0, {unit: 1.})
    like = SteeringVector(kept, like=made["iti"])
    close((like.steer(NEG, spread=.5) - NEG).norm(dim=-1), torch.full((40,), .5 * made["iti"].spread_.item()))
    close((like.steer(NEG, share=.5) - NEG).norm(dim=-1), torch.full((40,), .5 * made["iti"].median_norm_.item()))
    for s in (v, like):
        s.save_pretrained(tmp_path)
        again = ods.load_steerer(tmp_path)
        assert type(again) is SteeringVector and again.card == s.card and repr(again) == repr(s) and torch.equal(again.vector, s.vector) and again.strength_units == s.strength_units
        assert all(t.isfinite().all() for t in again.state_dict().values())
    with pytest.raises(ValueError, match="width 31, but the ITI was fitted on activations of width 32"): SteeringVector(kept[1:], like=made["iti"])
    with pytest.raises(TypeError, match="got dict"): SteeringVector(kept, like={})
    with pytest.raises(ValueError, match="layer must be the number of a block"): SteeringVector(kept, layer=-1)
    with pytest.raises(RuntimeError, match="not fitted"): SteeringVector().vector


def test_what_is_made_by_hand_is_no_method_of_a_sweep():
    assert ods.steerer_names("made") == ["vector", "ablation", "gate"]
    from odesteer.commands import METHODS
    assert not {*ods.steerer_names("made")} & {*METHODS, *ods.steerer_names(), *ods.steerer_names("placebo")}
    assert torch.equal(ods.make_steerer("vector").fit(POS, NEG).vector, ods.CAA().fit(POS, NEG).vector_field(NEG[0]))


# Arithmetic

def test_sums_are_sums_of_maps(made):
    a, b = made["caa"], made["iti"]
    for s, want in ((a + b, lambda f: f(a) + f(b)), (a - b, lambda f: f(a) - f(b)), (2 * a, lambda f: 2 * f(a)), (a * 2, lambda f: 2 * f(a)), (a / 2, lambda f: f(a) / 2), (-a, lambda f: -f(a)),
                    (sum([a, b, a]), lambda f: 2 * f(a) + f(b)), (2 * a - b / 4 + made["repe"], lambda f: 2 * f(a) - f(b) / 4 + f(made["repe"])), (np.float64(2) * a, lambda f: 2 * f(a)), (np.float32(.5) * a, lambda f: .5 * f(a))):
        assert type(s) is SteeringVector
        close(s.vector_field(NEG), want(lambda x: x.vector_field(NEG)))
        assert torch.equal(s.median_norm_, a.median_norm_) and torch.equal(s.spread_, a.spread_)
    close((a + b).vector, (b + a).vector)
    close((a + b - b).vector, SteeringVector(a).vector)
    bare = SteeringVector(torch.ones(D))
    assert (bare + a).strength_units == a.strength_units and (bare + bare).strength_units == ("T",)  # of the first that knows
    assert (bare + SteeringVector(torch.ones(D).double())).vector.dtype == torch.float64


def test_what_does_not_add_says_what_to_do(made):
    for name in STATE:
        s = made[name]
        for wrong in (lambda: s + made["caa"], lambda: made["caa"] + s, lambda: made["caa"] - s, lambda: 2 * s, lambda: -s, lambda: s / 2, lambda: sum([s, s])):
            with pytest.raises(TypeError, match=rf"field of {type(s).__name__} depends on the activation.*\[a, b\].*AllOf.*at=activations"): wrong()
    a = made["caa"]
    for wrong in (lambda: a + 1, lambda: 1 + a, lambda: a + "b", lambda: a * "b", lambda: a * a, lambda: a / a, lambda: a + NEG[0]):
        with pytest.raises(TypeError): wrong()
    for wrong, match in ((lambda: a - a, "they cancel"), (lambda: 0 * a, "they cancel"), (lambda: a * math.nan, "finite numbers; got nan"), (lambda: a * math.inf, "finite")):
        with pytest.raises(ValueError, match=match): wrong()
    with pytest.raises(RuntimeError, match="not fitted"): ods.CAA() + a
    with pytest.raises(ValueError, match="widths"): a + SteeringVector(torch.ones(D - 1))


def test_cards_decide_what_belongs_together():
    def at(**about):
        s = fit("caa")
        s.about.update(about)
        return s
    with pytest.raises(ValueError, match=r"blocks 1 and 2.*\{layer: steerer\}"): at(layer=1) + at(layer=2)
    with pytest.raises(ValueError, match="different models"): at(model="a/b") + at(model="a/c")
    assert (at(layer=1, note="x") + at(layer=1, note="y")).about == {"layer": 1}
    assert (at(model="a/b") + at(layer=3)).about == {"model": "a/b", "layer": 3} == (at(layer=3) + at(model="a/b", layer=None)).about
    assert (2 * at(layer=0)).about == {"layer": 0} and -at(layer=0) is not None


def test_without(made):
    v = SteeringVector(made["caa"])
    for others in ([made["iti"]], [made["iti"], made["random"]], [torch.eye(D)[:3]], [torch.ones(D), 2 * torch.ones(D)], [torch.ones(D).tolist()]):
        left = v.without(*others)
        for o in others:
            rows = SteeringVector(o).vector[None] if isinstance(o, ods.Steerer) else torch.as_tensor(o).reshape(-1, D)
            assert (rows @ left.vector).abs().max() < 1e-4 * v.vector.norm()
        assert left.strength_units == v.strength_units and left.vector.norm() <= v.vector.norm()
    with pytest.raises(ValueError, match="nothing is left"): v.without(made["caa"])
    with pytest.raises(ValueError, match="nothing is left"): v.without(torch.eye(D))
    with pytest.raises(ValueError, match="width"): v.without(torch.ones(3))
    with pytest.raises(ValueError, match="at least one direction"): v.without()
    with pytest.raises(ValueError, match="depends on the activation"): v.without(made["odesteer"])


# One after the other

def logits(model, mask=LEFT): return model(IDS, attention_mask=mask).logits


@pytest.mark.parametrize("arch, cache", [("llama", True), ("llama", False), ("falcon", True), ("mamba", True), ("gemma2", False), ("gpt2", True)])
def test_a_list_is_nested_blocks(made, arch, cache):
    model, three = tiny_model(arch), [made["caa"], made["odesteer"], made["linact"]]
    strength = dict(spread=torch.tensor([.5, 0., 1.]))
    def answers():
        out = model.generate(IDS, attention_mask=LEFT, use_cache=cache, output_logits=True, return_dict_in_generate=True, **GREEDY)
        return torch.stack(out.logits)
    orders = list(itertools.permutations(three))[:3]
    found = []
    for order in orders:
        with ods.steering(model, order[0], layer=1, **strength), ods.steering(model, order[1], layer=1, **strength), ods.steering(model, order[2], layer=1, **strength): nested = answers()
        for obj, at in (({1: list(order)}, {}), (order, dict(layer=1)), ({1: order[:2], 1 - LAYERS: order[2]}, {})):
            with ods.steering(model, obj, **at, **strength) as h: assert torch.equal(answers(), nested)
            with ods.steering(model, order[0], layer=1, **strength) as one: answers()
            assert h.applied == one.applied  # an activation that two have steered counts once
        found.append(nested)
    assert not torch.equal(found[0], found[1])  # the order counts
    plain = answers()
    assert not torch.equal(plain[:, 0], found[0][:, 0])


def test_a_list_keeps_units_handles_and_errors(made):
    model = tiny_model("llama")
    caa, iti = made["caa"], made["iti"]
    handle = ods.steering(model, [caa, iti], layer=2, spread=.5)
    half = logits(model)
    handle.strength = {"spread": 1.}
    whole = logits(model)
    handle.strength = 2.
    two = logits(model)
    assert "layer 2 of" in repr(handle)
    handle.remove()
    for strength, out in (({"spread": .5}, half), ({"spread": 1.}, whole), (2., two)):
        with ods.steering(model, caa, layer=2, strength=strength), ods.steering(model, iti, layer=2, strength=strength): assert torch.equal(logits(model), out)
    with ods.steering(model, caa + caa, layer=2, T=1.): same = logits(model)
    with ods.steering(model, [caa, caa], layer=2, T=1.): close(logits(model), same)
    sites = [copy.deepcopy(caa), copy.deepcopy(iti)]
    for i, s in enumerate(sites): s.about["layer"] = i
    with ods.steering(model, sites, spread=1.): each = logits(model)  # every one at the block of its card
    with ods.steering(model, dict(enumerate(sites)), spread=1.): assert torch.equal(logits(model), each)
    for bad, error, match in (([], ValueError, "list is empty"), ({1: []}, ValueError, "list is empty"), ([caa, "x"], TypeError, "cannot steer with str"), ([caa, ods.CAA], TypeError, "CAA is a class"), ([caa, ods.CAA()], RuntimeError, "not fitted")):
        with pytest.raises(error, match=match): ods.steering(model, bad, **({} if isinstance(bad, dict) else dict(layer=1)), T=1.)
    with pytest.raises(ValueError, match="no layer= beside it"): ods.steering(model, {1: [caa, iti]}, layer=1, T=1.)
    with pytest.raises(ValueError, match="say how far to steer"): ods.steering(model, [caa, iti], layer=1)  # ITI's field has no published length
    with ods.steering(model, [caa, made["linact"]], layer=1): logits(model)
    assert not ods.models.is_steered(model)


def test_a_list_remembers_for_each(made):
    "TruthFlow adds the correction of the prompt as the steerers before it have left it"
    model, flow = tiny_model("llama"), made["truthflow"]
    for order in ([made["caa"], flow], [flow, made["caa"]], [flow, flow]):
        with ods.steering(model, order[0], layer=1, T=1.), ods.steering(model, order[1], layer=1, T=1.): nested = model.generate(IDS, attention_mask=LEFT, num_beams=2, **GREEDY)
        with ods.steering(model, order, layer=1, T=1.): assert torch.equal(model.generate(IDS, attention_mask=LEFT, num_beams=2, **GREEDY), nested)


def test_effort_of_several_is_added_up(made):
    model, tok, caa = tiny_model("llama"), tiny_tokenizer(), made["caa"]
    how = dict(answers=["yes", "no."], strength={"spread": .5})
    one, two = (effort(model, tok, ["who?", "is it?"], obj, layer=1, **how) for obj in (caa, [caa, caa]))
    assert one["tokens"] == two["tokens"] > 0
    assert one["per_layer"][1] < two["per_layer"][1] < 2 * one["per_layer"][1] + 1e-6
    assert effort(model, tok, ["who?", "is it?"], {1: [caa, caa]}, **how) == two


# Ablation

SPANS = {"a steerer": lambda m: m["caa"], "a vector": lambda m: torch.randn(D, generator=torch.Generator().manual_seed(1)), "a list": lambda m: [m["caa"], m["iti"], torch.ones(D)], "rows": lambda m: torch.randn(5, D, generator=torch.Generator().manual_seed(2)),
         "rows twice": lambda m: torch.ones(3, D), "all but one": lambda m: torch.eye(D)[1:], "tiny and large": lambda m: [1e-8 * torch.ones(D), 1e8 * m["iti"].coef_]}


@pytest.mark.parametrize("span", SPANS)
def test_ablation_removes_a_span_and_nothing_else(made, span):
    s, x = Ablation(of=SPANS[span](made)), 10 * NEG.double()
    U = s.basis_.double()
    close(U @ U.T, torch.eye(len(U)).double(), 1e-5)
    once = s.steer(x, T=1.)
    assert (once @ U.T).abs().max() < 1e-5
    close(s.steer(once, T=1.), once, 1e-6)
    rest = torch.linalg.svd(U, full_matrices=True).Vh[len(U):]
    close(once @ rest.T, x @ rest.T, 1e-6)
    for T in (.25, 2., -1.): close(s.steer(x, T=T) @ U.T, (1 - T) * x @ U.T, 1e-5)
    assert torch.equal(s.steer(x, T=0.), x) and s.strength_units == ("T",) and s.default_strength == {"T": 1.}
    half = s.steer(x.bfloat16(), T=1.)
    assert half.dtype == torch.bfloat16 and (half.double() @ U.T).abs().max() < .02 * x.norm(dim=-1).max()


def test_ablation_as_a_steerer(made, tmp_path):
    fitted = Ablation().fit(POS, NEG)
    close(Ablation(of=made["caa"]).steer(NEG, T=1.), fitted.steer(NEG, T=1.))
    assert "1 direction," in repr(fitted) and fitted.strength_units == ("T", "share", "spread") and len(Ablation(of=[torch.ones(D), 2 * torch.ones(D)]).basis_) == 1
    for s in (fitted, Ablation(of=[made["caa"], made["iti"]], layer=2)):
        s.save_pretrained(tmp_path)
        again = ods.load_steerer(tmp_path)
        assert again.card == s.card and torch.equal(again.steer(NEG, T=1.), s.steer(NEG, T=1.)) and repr(again) == repr(s)
    rewrite(tmp_path, tensors=lambda t: {**t, "basis_": t["basis_"] * 3})
    with pytest.raises(ValueError, match="rows of basis_ are not orthonormal"): ods.load_steerer(tmp_path)
    far = fit("caa")
    far.about.update(layer=1, model="me/this")
    assert Ablation(of=far).about == {"model": "me/this"} and Ablation(of=far, layer=3).about == {"model": "me/this", "layer": 3}  # a direction of one block, for all
    for bad, error, match in ((made["odesteer"], ValueError, "depends on the activation"), ([], ValueError, "at least one"), (torch.zeros(D), ValueError, "zero"), ([torch.ones(3), torch.ones(4)], ValueError, "widths"), ("x", TypeError, "str")):
        with pytest.raises(error, match=match): Ablation(of=bad)
    with pytest.raises(ValueError, match="give T=, or fit it"): Ablation(of=torch.ones(D)).steer(NEG, spread=1.)
    with pytest.raises(RuntimeError, match="not fitted"): Ablation().steer(NEG, T=1.)


@pytest.mark.parametrize("arch", ["gpt_neox", "falcon", "phi"])  # attention and MLP read the same state
def test_ablation_at_every_block_is_another_set_of_weights(arch):
    "Where nothing is written along the direction, nothing has to be removed: embeddings and all that writes to the stream are projected"
    model, u = tiny_model(arch), torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(3)), dim=0)
    P = torch.eye(D) - torch.outer(u, u)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad(): embedding.copy_(embedding @ P)
    projected = copy.deepcopy(model)
    writers = re.compile(r"(dense|dense_4h_to_h|fc2)$")
    with torch.no_grad():
        for name, m in projected.get_decoder().named_modules():
            if not writers.search(name): continue
            m.weight.copy_(P @ m.weight)
            if m.bias is not None: m.bias.copy_(P @ m.bias)
    with ods.steering(model, {i: Ablation(of=u) for i in range(LAYERS)}, positions="all"): ablated = model(IDS).logits
    close(ablated, projected(IDS).logits)
    assert not torch.allclose(model(IDS).logits, ablated, atol=1e-2)


# Gates

@pytest.fixture(scope="module")
def llama(): return tiny_model("llama")


@pytest.fixture(scope="module")
def ends(llama):
    "Activations behind block 1 at the end of the three prompts"
    seen = []
    handle = ods.decoder_layers(llama)[1].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad(): llama(IDS, attention_mask=LEFT)
    handle.remove()
    return seen[0][:, -1].detach()


def gate_for(ends, inner, opens=(True, False, True)):
    "A gate that opens for these of the three prompts"
    y = torch.tensor(opens).float() * 2 - 1
    w = torch.linalg.lstsq(torch.nn.functional.pad(ends, (0, 1), value=1.).double(), y.double()[:, None], driver="gelsd").solution[:, 0].float()
    gate = Gate(inner, SteeringVector(w[:-1]), threshold=-w[-1].item())
    assert gate.opens(ends).tolist() == list(opens)
    return gate


def mixed(gate, model, steered, plain, rows=(0, 2)):
    "The rows that are steered from one answer, the others from the other"
    return torch.stack([(steered if i in rows else plain)[i] for i in range(len(plain))])


@pytest.mark.parametrize("how", [dict(), dict(use_cache=False), dict(num_beams=3), dict(cache_implementation="static"), dict(prefill_chunk_size=3)], ids=str)
@pytest.mark.parametrize("inner", ["caa", "odesteer", "truthflow"])
def test_a_gate_is_decided_by_the_prompt_and_holds_for_the_answer(made, llama, ends, how, inner):
    if inner != "caa" and how not in (dict(), dict(num_beams=3)): pytest.skip("the same code")
    gate = gate_for(ends, made[inner])
    strength = torch.tensor([30., 30., 15.])
    def answers(obj):
        handle = ods.steering(llama, obj, layer=1, T=strength) if obj else None
        out = llama.generate(IDS, attention_mask=LEFT, **{**GREEDY, **how})[:, 7:]
        if handle: handle.remove()
        return out
    steered, plain, gated = answers(made[inner]), answers(None), answers(gate)
    assert torch.equal(gated, mixed(gate, llama, steered, plain)) and not torch.equal(gated, plain) and not torch.equal(gated, steered)


@pytest.mark.parametrize("arch", ["falcon", "mamba", "gemma2", "gpt2", "bloom"])
def test_closed_rows_keep_their_bits(made, arch):
    model, seen = tiny_model(arch), []
    class Look(Gate):
        def opens(self, q):
            seen.append(super().opens(q))
            return torch.tensor([True, False, True])[:len(q)]
    gate = Look(made["caa"], made["iti"])
    def run():
        out = model.generate(IDS, attention_mask=LEFT, output_logits=True, return_dict_in_generate=True, **GREEDY)
        return torch.stack(out.logits)
    plain = run()
    with ods.steering(model, gate, layer=1, spread=1.): gated = run()
    with ods.steering(model, made["caa"], layer=1, spread=1.): steered = run()
    assert len(seen) == 2 and torch.equal(gated[0, 1], plain[0, 1]) and torch.equal(gated[0, [0, 2]], steered[0, [0, 2]])  # one is of the warm up
    assert torch.equal(gated[:, 1], plain[:, 1])
    assert not torch.equal(gated[:, 0], plain[:, 0])


def test_gates_in_lists_in_gates_and_in_scores(made, llama, ends):
    a, b = gate_for(ends, made["caa"], (True, False, True)), gate_for(ends, made["iti"], (False, False, True))
    with ods.steering(llama, [a, b], layer=1, spread=2.): out = logits(llama)
    plain = logits(llama)
    assert torch.equal(out[1], plain[1])
    with ods.steering(llama, a, layer=1, spread=2.): one = logits(llama)
    assert torch.equal(out[0], one[0]) and not torch.equal(out[2], one[2])
    both = Gate(a, b.when, b.threshold)  # open where both are
    assert both.opens(ends).tolist() == [False, False, True] and both.strength_units == a.strength_units
    with ods.steering(llama, both, layer=1, spread=2.): out = logits(llama)
    assert torch.equal(out[:2], plain[:2]) and torch.equal(out[2], one[2])
    tok, prompts, answers = tiny_tokenizer(), ["what is it?", "who", "where is the fish?"], [" a bird.", " nobody at all.", " x"]
    at = ods.collect_activations(llama, tok, prompts, layers=1, progress=False)[1]
    gate = gate_for(at, made["caa"], (False, True, False))
    plain = ods.score_continuations(llama, tok, prompts, answers)
    for positions in ("last", "all"):
        with ods.steering(llama, gate, layer=1, spread=2., positions=positions): gated = ods.score_continuations(llama, tok, prompts, answers)
        with ods.steering(llama, made["caa"], layer=1, spread=2., positions=positions): steered = ods.score_continuations(llama, tok, prompts, answers)
        assert torch.equal(gated[[0, 2]], plain[[0, 2]]) and gated[1] == steered[1] != plain[1]


@pytest.mark.parametrize("inner", ["caa", "odesteer", "truthflow", "ablation", "shuffled"])
@pytest.mark.parametrize("when", ["caa", "iti", "repe", "odesteer", "vector"])
def test_a_gate_is_a_steerer(made, inner, when, tmp_path):
    if inner in ("truthflow", "shuffled") and when != "iti": pytest.skip("the same code")
    gate = Gate(made[inner], made[when]).choose(POS[:20], NEG[:20], max_false=.1)
    a = torch.cat([POS, NEG])
    opens = gate.opens(a)
    assert opens.any() and not opens.all() and gate.unit == made[inner].unit and gate.strength_units == made[inner].strength_units
    for strength in (dict(T=1.), *({u: .5} for u in ("spread", "share", "nats") if u in gate.strength_units)):
        out = gate.steer(a, **strength)
        assert torch.equal(out[~opens], a[~opens]) and torch.equal(out[opens], made[inner].steer(a, **strength)[opens])
    assert torch.equal(gate.vector_field(a)[opens], made[inner].vector_field(a)[opens]) and not gate.vector_field(a)[~opens].any()
    assert torch.equal(gate.steer(a, T=0.), a) and gate.steer(a.bfloat16(), T=1.).dtype == torch.bfloat16
    assert torch.equal(gate.steer(a, T=1., prompt=POS[:1]), made[inner].steer(a, T=1.)) or not gate.opens(POS[:1])
    gate.about["layer"] = 1
    gate.save_pretrained(tmp_path)
    for again in (ods.load_steerer(tmp_path), copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert type(again) is Gate and again.card == gate.card and repr(again) == repr(gate) and torch.equal(again.steer(a, T=1.), gate.steer(a, T=1.))
        assert again.state_dict().keys() == gate.state_dict().keys() and again.threshold == gate.threshold
    assert json.loads(json.dumps(gate.card)) == gate.card
    close(copy.deepcopy(gate).double().score(a.double()).float(), gate.score(a), 1e-3)


def test_what_makes_no_gate(made):
    caa = made["caa"]
    for bad, error, match in (((ods.SPID(), caa), TypeError, "got SPID"), ((caa, "iti"), TypeError, "got str"), ((caa, made["linact"]), TypeError, "climbs no barrier"), ((ods.CAA(), caa), RuntimeError, "not fitted"), ((caa, ods.ITI()), RuntimeError, "not fitted"),
                              ((caa, SteeringVector(torch.ones(D - 1))), ValueError, "width 32, the barrier 31"), ((caa, caa, "x"), ValueError, "threshold"), ((caa, caa, math.nan), ValueError, "threshold"), ((caa, caa, True), ValueError, "threshold")):
        with pytest.raises(error, match=match): Gate(*bad)
    gate = Gate(caa, made["iti"])
    for bad in (1., -.1, math.nan, 2):
        with pytest.raises(ValueError, match="max_false must lie in"): gate.choose(POS, NEG, bad)
    with pytest.raises(ValueError, match="no threshold steers a wanted prompt"): gate.choose(NEG - 50 * made["iti"].coef_, POS, .05)
    with pytest.raises(ValueError, match="no barrier to stop at"): gate.steer(NEG, nats=1.)
    with pytest.raises(ValueError, match="width 32; got shape"): gate.score(NEG[:, 1:])
    assert caa.width == D and gate.steerer is not caa  # of its own
    before = gate.steer(NEG, T=1.)
    caa2 = copy.deepcopy(caa)
    other = Gate(caa2, made["iti"])
    caa2.fit(NEG, POS)
    assert torch.equal(other.steer(NEG, T=1.), before)


def test_a_gate_belongs_to_one_place(made):
    def at(name="caa", **about):
        s = copy.deepcopy(made[name])
        s.about.update(about)
        return s
    for k, one, other in (("layer", 1, 2), ("model", "a/b", "a/c")):
        with pytest.raises(ValueError, match=f"steerer was fitted on {k} {one!r}, the barrier on {other!r}"): Gate(at(**{k: one}), at("iti", **{k: other}))
    assert Gate(at(layer=1, note="x"), at("iti", layer=1, note="y")).about == {"layer": 1, "note": "x"}
    assert Gate(at(), at("iti", layer=2, model="m", note="y")).about == {"layer": 2, "model": "m"} == Gate(at(layer=2), at("iti", model="m")).about


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gate_follows_the_models_precision(made, dtype):
    model, seen = tiny_model("llama").to(dtype), []
    handle = ods.decoder_layers(model)[1].register_forward_hook(lambda m, a, out: seen.append(out))
    plain = logits(model)
    handle.remove()
    for inner in ("caa", "odesteer", "truthflow"):
        gate = gate_for(seen[0][:, -1].detach(), made[inner])
        with ods.steering(model, gate, layer=1, T=5.): gated = logits(model)
        with torch.inference_mode(), ods.steering(model, made[inner], layer=1, T=5.): steered = logits(model)
        assert gated.dtype == dtype and torch.equal(gated[1], plain[1]) and torch.equal(gated[0], steered[0]) and not torch.equal(gated[0], plain[0])


def test_bare_barriers_steer_but_are_not_saved(made, tmp_path):
    w = made["iti"].coef_
    for barrier in (LinearBarrier(w, -.5), ScoreBarrier(lambda a: a @ w.to(a), .5)):
        gate, same = Gate(made["caa"], barrier), Gate(made["caa"], SteeringVector(w), .5)
        assert torch.equal(gate.opens(NEG), same.opens(NEG)) and torch.equal(gate.steer(NEG, T=1.), same.steer(NEG, T=1.))
        with pytest.raises(ValueError, match=f"holds a {type(barrier).__name__}, which could not be loaded again"): gate.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir()) and repr(gate)


def test_a_budget_of_false_alarms():
    g = torch.Generator().manual_seed(5)
    gate = Gate(fit("caa"), SteeringVector(torch.eye(D)[0]))
    pos, neg = torch.randn(60, D, generator=g) + 1., torch.randn(80, D, generator=g)
    for budget in (0., .05, .1, .5):
        gate.choose(pos, neg, budget)
        rate, true = (gate.opens(x).double().mean().item() for x in (neg, pos))
        assert rate <= budget and gate.chosen["false"] == rate and gate.chosen["true"] == true and gate.chosen["max_false"] == budget
        scores = gate.score(torch.cat([pos, neg])).sort().values
        higher = next(s for s in scores.flip(0) if s < gate.threshold)  # one more prompt let in would break the budget, or be an unwanted one
        looser = (gate.score(neg) >= higher).double().mean().item()
        assert looser > budget
        assert (scores - gate.threshold).abs().min() > 0  # in a gap: rounding changes nobody's side
    r = gate.roc(pos, neg)
    wins = (gate.score(pos)[:, None] > gate.score(neg)).double().mean().item()  # the probability that the area is
    assert abs(r.auc - wins) < 1e-9 and r.false[0] == r.true[0] == 0 and r.false[-1] == r.true[-1] == 1 and (np.diff(r.false) >= 0).all()
    assert repr(r) == f"AUC {r.auc:.3f} over 60 wanted and 80 other prompts"
    labels = torch.cat([torch.ones(60), torch.zeros(80)])
    assert gate.roc(torch.cat([pos, neg]), labels).auc == r.auc  # with labels, as everywhere


HARMS = {"a part of no method": (lambda c: {**c, "params": {**c["params"], "when": {**c["params"]["when"], "method": "os.system"}}}, "unknown method 'os.system'"),
         "a part that is a controller": (lambda c: {**c, "params": {**c["params"], "steerer": {**c["params"]["steerer"], "method": "spid", "params": {}}}}, "cannot be part of a gate"),
         "no card for a part": (lambda c: {**c, "params": {"threshold": 0.}}, "do not make a Gate"), "a part that is text": (lambda c: {**c, "params": {**c["params"], "when": "caa"}}, "do not make a Gate"),
         "a part of another width": (lambda c: {**c, "params": {**c["params"], "when": {**c["params"]["when"], "width": 7}}}, "its when has width 7"), "a threshold that is none": (lambda c: {**c, "params": {**c["params"], "threshold": "high"}}, "threshold must be"),
         "a part without settings": (lambda c: {**c, "params": {**c["params"], "when": {"method": "caa"}}}, "do not make a Gate"), "itself for ever": (lambda c: {**c, "params": {**c["params"], "when": c}}, "Gate")}
TENSOR_HARMS = {"a part's tensors missing": (lambda t: {k: v for k, v in t.items() if not k.startswith("when.")}, "no tensor is that wide"), "NaN in a part": (lambda t: {**t, "when.coef_": t["when.coef_"] * math.nan}, "holds NaN"),
                "a part's tensor of another width": (lambda t: {**t, "when.coef_": t["when.coef_"][:5]}, "do not make a Gate"), "a foreign part": (lambda t: {**t, "extra.x": torch.ones(2)}, "do not make a Gate")}


@pytest.mark.parametrize("harm", [*HARMS, *TENSOR_HARMS])
def test_damaged_gates_say_so(made, harm, tmp_path):
    Gate(made["caa"], made["iti"]).save_pretrained(tmp_path)
    if harm in HARMS: rewrite(tmp_path, HARMS[harm][0])
    else: rewrite(tmp_path, tensors=TENSOR_HARMS[harm][0])
    with pytest.raises(ValueError, match=(HARMS | TENSOR_HARMS)[harm][1]): ods.load_steerer(tmp_path)


def test_gates_are_checked_like_steerers(made):
    report = Gate(made["caa"], made["iti"], -2.).check(POS, NEG, placebos=2)
    assert "Gate(CAA()" in str(report) and all(passed for passed, text in report.findings if "changes no bit" in text)
    refit = Gate(made["caa"], made["iti"]).fit(POS + 1, NEG)
    assert torch.equal(refit.when.coef_, made["iti"].coef_) and not torch.equal(refit.steerer.mean_pos_, made["caa"].mean_pos_)
    assert "1 direction" in repr(Gate(Ablation(of=torch.ones(D)), made["iti"]))


# Budgets of divergence

TOK = tiny_tokenizer()
PROMPTS, ANSWERS = ["what is it?", "who", "where is the fish?", "a bird."], [" yes it is", " nobody at all", " x", " two"]


def kl_at(model, obj, strength, layer=1, answers=None, **kw):
    how = dict(layer=layer, strength=strength)
    if answers is None:
        with ods.steering(model, obj, **how): answers = ods.generate_text(model, TOK, PROMPTS, do_sample=False, max_new_tokens=20, **kw)
    return float(np.nanmean(ods.kl_to_unsteered(model, TOK, PROMPTS, answers, lambda: ods.steering(model, obj, **how))))


@pytest.mark.parametrize("name", ["caa", "odesteer", "ablation", "vector"])
def test_a_budget_is_kept_and_nearly_spent(made, llama, name):
    s, answers = made[name], ANSWERS
    for unit in (None, "T"):
        found = strength_for_kl(llama, TOK, s, PROMPTS, kl=.05, layer=1, unit=unit, answers=answers)
        assert isinstance(found, Calibrated) and list(found) == [unit or "spread"] and json.loads(json.dumps(found)) == found
        assert .95 * .05 <= found.kl <= .05 == found.budget and found.kl == pytest.approx(kl_at(llama, s, dict(found), answers=answers), rel=1e-3)
        assert len(found.tried) < 20 and f"{len(found.tried)} evaluations" in repr(found)
    with ods.steering(llama, s, layer=1, strength=found): logits(llama)
    with ods.steering(llama, s, layer=1, **found): logits(llama)
    tight = strength_for_kl(llama, TOK, s, PROMPTS, kl=.05, layer=1, answers=answers, tol=.001)
    assert .999 * .05 <= tight.kl <= .05 or len(tight.tried) > 10


def test_a_budget_along_the_steered_models_own_answers(made, llama):
    found = strength_for_kl(llama, TOK, made["caa"], PROMPTS, kl=.1, layer=1)
    assert found.kl <= .1 and found.kl == pytest.approx(kl_at(llama, made["caa"], dict(found)), rel=1e-3)
    both = strength_for_kl(llama, TOK, {1: [made["caa"], made["iti"]]}, PROMPTS, kl=.1, answers=ANSWERS)
    assert list(both) == ["spread"] and both["spread"] < 10
    bare = strength_for_kl(llama, TOK, [made["caa"], SteeringVector(torch.ones(D))], PROMPTS, kl=.1, layer=1, answers=ANSWERS)
    assert list(bare) == ["T"]  # the one unit that both know
    assert not ods.models.is_steered(llama)


@pytest.mark.parametrize("f,found", [(lambda x: x, .1), (lambda x: x**2, .1**.5), (lambda x: .3 * (x > .2), .2), (lambda x: .1 * math.sin(20 * x)**2 + (x > 1), 1.), (lambda x: math.nan if x > .3 else x / 10, .3), (lambda x: math.inf if x > 3 else 0., 3.), (lambda x: 1e3 * x, 1e-4)])
def test_the_first_crossing_from_below_is_halved(f, found):
    "Also where divergence falls in between, jumps, or is no number"
    from odesteer.compose import _largest_within
    class F:
        unit, tried = "T", []
        def __call__(self, x):
            self.tried = [*self.tried, (x, f(x))]
            return f(x)
    x, y = _largest_within(F(), 0., .1, .05, .125, 64.)
    assert y == f(x) <= .1 and (y >= .095 or abs(x - found) < .01 * found)


def test_budgets_out_of_reach_and_other_mistakes(made, llama):
    caa, long = made["caa"], ANSWERS
    def ask(obj=caa, prompts=PROMPTS, **kw): return strength_for_kl(llama, TOK, obj, prompts, **{**dict(layer=1, answers=long if len(prompts) == 4 else None), **kw})
    for match, kw in {"ask for less than 1e\\+06 .the largest strength tried is 2": dict(kl=1e6, most=2.), "kl must be a positive number; got 0": dict(kl=0), "got nan": dict(kl=math.nan), "got True": dict(kl=True), "tol must lie": dict(tol=1.), "start= must not be more": dict(start=2., most=1.),
                      "at least one validation prompt": dict(prompts=[]), "4 prompts but 1 answers": dict(answers=["x"]), "every answer is empty": dict(answers=["", " ", "", ""]), "unit must be 'spread' or 'share' or 'T' here; got 'until'": dict(unit="until"),
                      "unit must be 'T' here; got 'spread'": dict(obj=SteeringVector(torch.ones(D)), unit="spread"), "already at T": dict(obj=SteeringVector(1e12 * torch.ones(D)), kl=1e-7)}.items():
        with pytest.raises(ValueError, match=match): ask(**kw)
    with ods.steering(llama, caa, layer=1, T=1.):
        with pytest.raises(ValueError, match="being steered already"): ask()
        logits(llama)


def test_a_controllers_zero_is_a_set_point(llama):
    spid = ods.SPID(n_texts=4).fit(llama, TOK, ["yes", "a yes", "oh yes"], ["no", "a no", "oh no"], progress=False)
    answers = ANSWERS
    at_zero = kl_at(llama, spid, 0., layer=None, answers=answers)
    with pytest.raises(ValueError, match="already at T 0 the divergence"): strength_for_kl(llama, TOK, spid, PROMPTS, kl=at_zero / 2, answers=answers)
    found = strength_for_kl(llama, TOK, spid, PROMPTS, kl=2 * at_zero, answers=answers)
    assert found.tried[0] == (0., pytest.approx(at_zero, rel=1e-3)) and found.kl <= 2 * at_zero


def test_an_edit_behind_others_that_changes_the_shape_is_named_by_its_block():
    from odesteer.euler import Edit
    lm = ods.load_micro()
    class Bad:
        width, unit, about = None, "fraction", {}
        def edits(self, model, layer, strength): return {layer: Edit(lambda x, y, value: y[:, :3])}
    good = ods.SteeringVector(torch.ones(lm.model.config.hidden_size))
    with pytest.raises(ValueError, match=r"the edit at layer 2 was given \(1, "), ods.steering(lm.model, {2: [good, Bad()]}, strength=1.): lm.model(torch.tensor([[1, 2, 3]]))
