"Serving: rows, requests, cache keys and refusals without vLLM (`python -m tests.vllm` compares with it)"
import json
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import odesteer as ods
from odesteer import serving
from odesteer.cli import main
from odesteer.serving import (Ask, Miniature, Served, admitted, asked, blocks_of, cache_key, edit_rows, plan, prepare_engine, refuse_beams, requested,
                              serve_command, steered_rows, steerer_id, steerer_table)

WIDTH, DEPTH = 128, 4


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    "Folder with steerers of the micro model: two at one block, one at another"
    out, c = tmp_path_factory.mktemp("steerers"), lm.world.contrast("truth", "train")
    acts = {i: [ods.collect_activations(lm.model, lm.tokenizer, t[:120], layers=i, progress=False)[i] for t in (c.pos, c.neg)] for i in (1, 2)}
    for name, made, layer in ("caa", ods.CAA(), 1), ("iti", ods.ITI(), 2), ("ode", ods.ODESteer(n_components=400), 2):
        made.fit(*acts[layer])
        made.about["layer"] = layer
        made.save_pretrained(out/name)
    return out


@pytest.fixture(scope="module")
def table(saved): return steerer_table({n: saved/n for n in ("caa", "iti", "ode")}, WIDTH, DEPTH)


@pytest.fixture(scope="module")
def prompts(lm): return [e.ids for e in ods.models.encode(lm.tokenizer, [p.text for p in lm.world.prompts("truth", "test")[:8]])]


# What a steerer of a server may be

def small(width=8, layer=1, make=ods.CAA, **kw):
    g = torch.Generator().manual_seed(0)
    s = make(**kw).fit(torch.randn(30, width, generator=g) + 1, torch.randn(30, width, generator=g))
    if layer is not None: s.about["layer"] = layer
    return s


def test_table_is_json_and_is_made_from_itself(table, saved):
    again = json.loads(json.dumps(table))
    assert again == table == steerer_table(again, WIDTH, DEPTH), "an engine that is configured twice gets the same table"
    assert table["caa"]["default"] == {"T": 1.} and table["ode"]["default"] == {"spread": .5}
    assert table["ode"]["units"] == ["T", "share", "spread", "nats", "until"] and "nats" not in table["caa"]["units"]
    assert steerer_table({"x": {"path": str(saved/"caa"), "layer": -1}}, WIDTH, DEPTH)["x"]["layer"] == DEPTH - 1


def test_paths_do_not_depend_on_the_folder_of_a_process(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert steerer_table({"x": "caa"})["x"]["path"] == str((saved/"caa").resolve())


def test_an_id_tells_steerers_apart_and_survives_saving(tmp_path):
    a, b, other = small(), small(layer=2), small(make=ods.ITI)
    a.save_pretrained(tmp_path/"a")
    assert steerer_id(ods.load_steerer(tmp_path/"a")) == steerer_id(a) == steerer_id(b), "where it is used is not what it does"
    assert len({steerer_id(a), steerer_id(other), steerer_id(small(make=ods.ITI, C=.1))}) == 3


def test_what_no_worker_could_serve_is_refused(tmp_path, lm):
    c = lm.world.contrast("truth", "val")
    ods.make_steerer("spid").fit(lm.model, lm.tokenizer, c.pos[:8], c.neg[:8], progress=False).save_pretrained(tmp_path/"controller")
    g = torch.Generator().manual_seed(1)
    pos, neg = torch.randn(30, 8, generator=g) + 1, torch.randn(30, 8, generator=g)
    flow = ods.TruthFlow(epochs=1).fit(pos, neg, source=neg)
    flow.about["layer"] = 1
    flow.save_pretrained(tmp_path/"flow")
    small(layer=None).save_pretrained(tmp_path/"homeless")
    small().save_pretrained(tmp_path/"good")
    for at, why in (("controller", "is a controller.*odesteer.steering"), ("flow", "for each prompt.*odesteer.steering"), ("homeless", "say which block"),
                    ({"path": str(tmp_path/"good"), "layer": 4}, "no block 4: this model has blocks 0 to 3"), ({"path": str(tmp_path/"good"), "layer": True}, "say which block"),
                    ({"layer": 1}, "give a name and its path"), ({"path": str(tmp_path/"good"), "scale": 2}, "give a name and its path")):
        with pytest.raises(ValueError, match=why): steerer_table({"x": tmp_path/at if isinstance(at, str) else at}, 8, 4)
    with pytest.raises(ValueError, match="width 8, but the model has width 16"): steerer_table({"x": tmp_path/"good"}, 16, 4)
    with pytest.raises(ValueError, match="give a name"): steerer_table({" ": tmp_path/"good"})
    with pytest.raises(ValueError, match="must be"): steerer_table([tmp_path/"good"])
    with pytest.raises(FileNotFoundError): steerer_table({"x": tmp_path/"nowhere"})


def test_a_unit_that_fails_is_not_offered(tmp_path):
    g = torch.Generator().manual_seed(0)
    sequences = [torch.randn(5, 8, generator=g) for _ in range(12)]
    s = ods.REControl(epochs=1).fit(torch.randn(30, 8, generator=g) + 1, torch.randn(30, 8, generator=g), sequences=sequences, rewards=torch.randn(12, generator=g))
    assert "nats" in s.strength_units, "it has a barrier"
    s.about["layer"] = 0
    s.save_pretrained(tmp_path/"x")
    assert not {"nats", "until"} & {*steerer_table({"x": tmp_path/"x"})["x"]["units"]}, "but cannot stop at a level"


# What a request may ask

@pytest.mark.parametrize("extra, want", [
    (None, None), ({}, None), ({"other": 1}, None),
    ({"odesteer": "caa"}, ("caa", "T", 1.)), ({"odesteer": "ode"}, ("ode", "spread", .5)),
    ({"odesteer": "ode", "odesteer_nats": 3}, ("ode", "nats", 3.)), ({"odesteer": "caa", "odesteer_strength": -2}, ("caa", "T", -2.)),
    ({"odesteer": "caa", "odesteer_strength": 0}, None), ({"odesteer": "ode", "odesteer_spread": -0.}, None),
    ({"odesteer": "ode", "odesteer_until": 0}, ("ode", "until", 0.)),  # a level, not a distance
])
def test_a_request_is_read(extra, want, table):
    ask = requested(extra, table)
    assert (ask and ask[:3]) == want and (ask is None or ask.id == table[ask.name]["id"])


@pytest.mark.parametrize("extra, why", [
    ({"odesteer": "nope"}, "no steerer 'nope': this server has caa, iti, ode"), ({"odesteer": 3}, "no steerer 3"), ({"odesteer": ["caa"]}, "no steerer"), ({"odesteer": None}, "no steerer"),
    ({"odesteer_strength": 1}, "without odesteer=NAME"), ({"odesteer": "caa", "odesteer_strenght": 1}, "unknown odesteer_strenght"), ({"odesteer": "caa", "odesteer_T": 1}, "unknown odesteer_T"),
    ({"odesteer": "caa", "odesteer_nats": 1}, "does not know odesteer_nats: use one of odesteer_strength, odesteer_spread, odesteer_share$"),
    ({"odesteer": "ode", "odesteer_spread": 1, "odesteer_until": 1}, "one unit"), ({"odesteer": "caa", "odesteer_ask": ["caa", "T", 1., ""]}, "unknown odesteer_ask"),
    *(({"odesteer": "caa", "odesteer_spread": v}, "finite number") for v in ("high", "2", True, None, float("nan"), float("inf"), 1e300, -1e39, 10**400, [1.])),
])
def test_what_a_request_may_not_ask(extra, why, table):
    for check in requested, admitted:
        with pytest.raises(ValueError, match=why): check(extra, table)


def test_a_server_without_steerers_refuses_all_who_want_one():
    for extra in ({"odesteer": "caa"}, {"odesteer_strength": 1.}):
        with pytest.raises(ValueError, match="no steerers: start it with odesteer serve"): requested(extra, {})
    same = {"other": 2}
    assert requested(same, {}) is None and admitted(same, {}) is same and admitted(None, {}) is None


def test_the_form_behind_the_front_end_is_plain(table):
    given = {"odesteer": "ode", "odesteer_share": .2, "other": 1}
    form = admitted(given, table)
    assert json.loads(json.dumps(form)) == form and form["other"] == 1 and "odesteer" not in form and given["odesteer"] == "ode"
    assert asked(json.loads(json.dumps(form))) == (requested(given, table), None)
    assert admitted({"odesteer": "caa", "odesteer_strength": 0, "other": 1}, table) == {"other": 1}, "no strength is no steering, and shares everything"


@pytest.mark.parametrize("what", ["1", 5, None, [0], [0, [9]], [0, [1], 2], [[], [1]], [{}, [1]], [0, 1], [0, [[1]]], [0, "12"], [0, {"1": 1}]])
def test_reading_is_refused_where_it_was_not_asked_for(what, table):
    with pytest.raises(ValueError, match="does not read activations"): admitted({"odesteer_collect": what}, table)
    with pytest.raises(ValueError, match="must be"): admitted({"odesteer_collect": what}, table, [1, 2])


def test_reading_and_steering_go_together(table):
    form = admitted({"odesteer": "caa", "odesteer_collect": [7, [1]]}, table, [1, 2])
    assert asked(form) == (requested({"odesteer": "caa"}, table), [7, [1]])
    assert asked(admitted({"odesteer_collect": [7, [1]]}, {}, [1])) == (None, [7, [1]]), "of an engine without steerers too"


def test_beams_are_refused_only_where_they_would_be_steered():
    refuse_beams(None)
    refuse_beams({"other": 1})
    with pytest.raises(ValueError, match="beam search is not steered"): refuse_beams({"odesteer": "caa"})


# Rows

@pytest.mark.parametrize("prompt, done, now, want", [
    (5, 0, 5, [4]), (5, 0, 4, []), (5, 4, 1, [0]), (5, 0, 8, [4, 5, 6, 7]), (5, 5, 1, [0]), (5, 9, 3, [0, 1, 2]),
    (1, 0, 1, [0]), (1, 0, 3, [0, 1, 2]), (1, 1, 1, [0]), (8, 4, 4, [3]), (8, 3, 4, []), (8, 0, 0, []), (8, 8, 0, []),
])
def test_rows_of_a_request(prompt, done, now, want): assert [*steered_rows(prompt, done, now)] == want


def test_rows_do_not_depend_on_chunks():
    "However a request is cut into passes, and thrown out between, each of its tokens is steered as often as computed"
    for prompt in (1, 2, 7, 8, 9, 16):
        for chunk in (1, 3, 8, 40):
            found, done = [], 0
            while done < 20:
                now = min(chunk, 20 - done)
                found += [done + i for i in steered_rows(prompt, done, now)]
                done += now
            assert found == [*range(prompt - 1, 20)]


def test_a_plan_touches_each_row_once_and_nobody_elses(table):
    asks = [None, Ask("caa", "T", 2.), Ask("iti", "T", 3.), Ask("ode", "T", 3.), Ask("ode", "spread", 1.), Ask("ode", "T", -1.), Ask("caa", "T", 0.5)]
    batch, scheduled = [(a, 4, 2) for a in asks], [3, 3, 0, 2, 2, 1, 4]
    found = plan(batch, scheduled, table)
    assert found == {1: [("caa", "T", [4, 5, 12, 13, 14], [2., 2., .5, .5, .5])], 2: [("ode", "T", [7], [3.]), ("ode", "spread", [9], [1.])]}
    assert plan([], [], table) == plan([(None, 3, 0)], [3], table) == {}
    with pytest.raises(ValueError): plan(batch, scheduled[:-1], table)


def test_a_strength_of_its_own_for_each_row(table, saved):
    served, g = Served(table), torch.Generator().manual_seed(0)
    h, r = torch.randn(2, 5, WIDTH, generator=g)
    served.begin([(Ask("iti", "T", 2.), 1, 0, None), (Ask("ode", "share", .1), 1, 0, None), (None, 1, 0, None), (Ask("iti", "T", -5.), 1, 0, None), (Ask("ode", "share", .3), 1, 0, None)], [1] * 5)
    h2, r2 = served.apply(h, r, 2)
    want = h + r
    for i, name, strength in ((0, "iti", dict(T=2.)), (1, "ode", dict(share=.1)), (3, "iti", dict(T=-5.)), (4, "ode", dict(share=.3))): want[i] = ods.load_steerer(saved/name).steer((h + r)[i], **strength)
    torch.testing.assert_close(h2 + r2, want, rtol=1e-6, atol=1e-5)
    assert torch.equal(h2[2], h[2]) and torch.equal(r2[2], r[2]) and not torch.equal(h2, h), "copies, and the unsteered row bit for bit"
    assert served.apply(h, r, 0) == (h, r) and served.apply(h, r, 0)[0] is h, "no work, no copy"
    served.end()
    assert served.applied == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_what_the_edit_says(dtype):
    h, r = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    h2, r2 = h.clone(), r.clone()
    edit_rows(h2, r2, torch.tensor([2]), torch.tensor([3.]), lambda _, a, v: a * v[:, None].to(a.dtype))
    assert torch.equal((h2 + r2)[2], (h + r)[2] * 3) and torch.equal(h2[:2], h[:2])
    edit_rows(h2, None, torch.tensor([0]), torch.tensor([3.]), lambda _, a, v: a + 1)
    assert torch.equal(h2[0], h[0] + 1)
    with pytest.raises(ValueError, match="an edit was given"): edit_rows(h2, r2, torch.tensor([0]), torch.tensor([1.]), lambda _, a, v: a.double())


def test_rows_that_were_planned_and_missed_are_an_error(table):
    served = Served(table)
    served.begin([(Ask("caa", "T", 1.), 2, 0, None)], [2])
    with pytest.raises(RuntimeError, match="1 rows were to be steered in this pass, but 0 were"): served.end()
    served.end()  # the next pass begins anew: a pass without a plan, such as one that warms up, has nothing to count
    served.begin([(Ask("caa", "T", 1.), 2, 0, None)], [2])
    served.apply(torch.zeros(2, WIDTH), None, 1)
    served.apply(torch.zeros(2, WIDTH), None, 1)
    with pytest.raises(RuntimeError, match="but 2 were"): served.end()


def test_a_steerer_that_changed_meanwhile_is_noticed(tmp_path):
    small().save_pretrained(tmp_path/"x")
    table = steerer_table({"x": tmp_path/"x"})
    small(make=ods.ITI).save_pretrained(tmp_path/"x")
    with pytest.raises(RuntimeError, match="x changed on disk"): Served(table)


# The prefix cache

def test_only_blocks_with_a_steered_token_get_a_key():
    ask = Ask("caa", "T", 2., "id")
    assert [end for end in range(1, 40) if cache_key(ask, 17, end)] == [*range(17, 40)], "position 16 is the first that is steered"
    assert cache_key(ask, 1, 1) and cache_key(None, 5, 99) is None


def test_keys_differ_wherever_keys_and_values_do():
    ask = Ask("caa", "T", 2., "id")
    others = [ask._replace(name="b"), ask._replace(unit="share"), ask._replace(value=2.5), ask._replace(id="other"), ask._replace(value=-2.)]
    keys = [cache_key(a, 5, 8) for a in (ask, *others)] + [cache_key(ask, 6, 8)]
    assert len({*keys}) == len(keys) and cache_key(Ask(*ask), 5, 16) == keys[0]


# A server in miniature against `steering`

def script(lm, saved, ids, ask, n):
    with ods.steering(lm.model, ods.load_steerer(saved/ask.name), **{ask.unit: ask.value}) if ask else nullcontext():
        out = lm.model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)
    return ended(lm, out[0, len(ids):].tolist())


def ended(lm, answer):
    stops = {lm.tokenizer.eos_token_id, *lm.model.generation_config.eos_token_id}
    return answer[:next((i for i, t in enumerate(answer) if t in stops), len(answer))]


ASKS = [None, Ask("caa", "T", 1.5), Ask("ode", "spread", -1.), Ask("iti", "spread", 1.5)]

@pytest.fixture(scope="module")
def scripts(lm, saved, prompts): return {(i, a): script(lm, saved, prompts[i], a, 9) for i in range(4) for a in ASKS}


@pytest.mark.parametrize("how", [{}, dict(tokens=7), dict(block=4), dict(block=1, tokens=3)], ids=str)
def test_many_requests_in_one_row_are_answered_as_if_alone(how, lm, table, prompts, scripts):
    server = Miniature(lm.model, Served(table), **how)
    got = {(i, a): server.ask(prompts[i], 9, a) for i in range(4) for a in ASKS}
    for _ in range(4): server.step()
    list(got.values())[5].forget()  # thrown out, computed again
    list(got.values())[0].forget()
    server.run()
    assert {k: ended(lm, r.answer) for k, r in got.items()} == scripts
    assert sum(scripts[i, a] != scripts[i, None] for i, a in scripts) > 6
    assert not lm.model.model.layers[1]._forward_hooks, "no hook is left behind"


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_a_prompt_that_ends_at_the_edge_of_a_block(length, lm, saved, table, prompts):
    ids, ask = prompts[0][:length], Ask("caa", "T", 3.)
    server, want = Miniature(lm.model, Served(table), block=8), [script(lm, saved, ids, a, 10) for a in (ask, None, ask)]
    got = []
    for a in (ask, None, ask):  # one after the other, so that each finds what the one before left
        r = server.ask(ids, 10, a)
        server.run()
        got.append(ended(lm, r.answer))
    assert got == want


def test_a_second_turn_needs_the_key(lm, saved, table, prompts):
    strong, wrong = Ask("ode", "spread", -2.), {}
    for guard in (True, False):
        server = Miniature(lm.model, Served(table), guard=guard)
        first = [server.ask(ids, 17, strong) for ids in prompts]
        server.run()
        second = [(r.ids + prompts[0][-6:], a) for r in first for a in (None, ASKS[1])]
        got = [server.ask(ids, 8, a) for ids, a in second]
        server.run()
        wrong[guard] = sum(ended(lm, r.answer) != script(lm, saved, ids, a, 8) for r, (ids, a) in zip(got, second))
    assert wrong[True] == 0 < wrong[False]


def test_reading_is_collecting(lm, saved, table, prompts):
    texts = [p.text for p in lm.world.prompts("truth", "test")[:8]]
    for ask in (None, Ask("caa", "spread", .8)):
        server = Miniature(lm.model, Served(table, collect=[0, 1, 3]), tokens=11)
        for i, ids in enumerate(prompts): server.ask(ids, 1, ask, (i, [0, 1, 3]))
        kept = server.run().served.kept
        with ods.steering(lm.model, ods.load_steerer(saved/"caa"), spread=.8) if ask else nullcontext():
            want = ods.collect_activations(lm.model, lm.tokenizer, texts, layers=[0, 1, 3], progress=False)
        for layer, a in want.items(): torch.testing.assert_close(torch.stack([kept[i][layer] for i in range(8)]), a, rtol=1e-4, atol=1e-4)


# Engines

def engine(**changes):
    parts = dict(model_config=dict(runner_type="generate", is_encoder_decoder=False, get_hidden_size=lambda: WIDTH, get_total_num_hidden_layers=lambda: DEPTH),
                 parallel_config=dict(pipeline_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False, distributed_executor_backend="mp", worker_extension_cls=""),
                 cache_config=dict(kv_sharing_fast_prefill=False), compilation_config=dict(cudagraph_mode=SimpleNamespace(name="NONE")))
    made = SimpleNamespace(use_v2_model_runner=False, speculative_config=None, kv_transfer_config=None, additional_config={}, **{k: SimpleNamespace(**v) for k, v in parts.items()})
    for name, value in changes.items():
        *path, last = name.split("__")
        target = made
        for p in path: target = getattr(target, p)
        setattr(target, last, value)
    return made


@pytest.mark.parametrize("changes, device, way_out", [
    (dict(use_v2_model_runner=True), "cuda", "VLLM_USE_V2_MODEL_RUNNER=0"), ({}, "tpu", "CPU, CUDA"), (dict(compilation_config__cudagraph_mode=SimpleNamespace(name="PIECEWISE")), "cuda", "--enforce-eager"),
    (dict(model_config__runner_type="pooling"), "cpu", "generate"), (dict(model_config__is_encoder_decoder=True), "cpu", "decoder"),
    (dict(parallel_config__pipeline_parallel_size=2), "cpu", "--tensor-parallel-size"), (dict(parallel_config__prefill_context_parallel_size=2), "cpu", "leave it out"),
    (dict(parallel_config__use_ubatching=True), "cuda", "--enable-dbo"), (dict(parallel_config__distributed_executor_backend="ray"), "cuda", "mp"),
    (dict(cache_config__kv_sharing_fast_prefill=True), "cpu", "--kv-sharing-fast-prefill"), (dict(speculative_config=SimpleNamespace(method="eagle")), "cuda", "ngram"),
    (dict(kv_transfer_config=object()), "cuda", "--kv-transfer-config"), (dict(parallel_config__worker_extension_cls="my.Own"), "cpu", "worker_extension_cls"),
])
def test_engines_that_could_not_steer_do_not_start(changes, device, way_out, saved):
    config = engine(additional_config={"odesteer": {"caa": str(saved/"caa")}}, **changes)
    with pytest.raises(ValueError, match=way_out): prepare_engine(config, device)
    prepare_engine(idle := engine(**changes), device)
    assert idle.additional_config == {}, "who does not steer is left alone"


def test_an_engine_gets_the_table(saved, table):
    config = engine(additional_config={"odesteer": {n: str(saved/n) for n in table}, "other": 1, "odesteer_collect": [3, 0, -1]}, speculative_config=SimpleNamespace(method="ngram"))
    for _ in range(2):
        prepare_engine(config, "cpu")
        assert config.additional_config == {"odesteer": table, "other": 1, "odesteer_collect": [0, 3]}
    assert config.parallel_config.worker_extension_cls == "odesteer.serving.Extension"
    only = engine(additional_config={"odesteer_collect": [1]})
    prepare_engine(only, "cpu")
    assert only.additional_config == {"odesteer": {}, "odesteer_collect": [1]}
    for bad in ([4], [True], ["1"], [1.]):
        with pytest.raises(ValueError, match="odesteer_collect must list blocks from 0 to 3"): prepare_engine(engine(additional_config={"odesteer_collect": bad}), "cpu")


# The glue that needs no vLLM

def test_blocks_are_found(lm):
    assert blocks_of(lm.model, DEPTH) is lm.model.model.layers
    def stack(n): return nn.ModuleList(nn.Linear(1, 1) for _ in range(n))
    both = nn.ModuleDict(dict(visual=nn.ModuleDict(dict(blocks=stack(3))), language=nn.ModuleDict(dict(layers=stack(3)))))
    assert blocks_of(both, 3) is both["language"]["layers"]
    nested = nn.ModuleDict(dict(layers=nn.ModuleList(nn.ModuleDict(dict(experts=stack(3))) for _ in range(3))))
    assert blocks_of(nested, 3) is nested["layers"], "lists within blocks are none"
    for model in (nn.ModuleDict(dict(a=stack(3), b=stack(3))), nn.ModuleDict(dict(a=stack(2)))):
        with pytest.raises(ValueError, match="where the 3 blocks"): blocks_of(model, 3)


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
    def forward(self, x): return {"one": x, "two": (x, x * 2), "more": (x, x * 2, "more"), "first": (x, None)}[self.kind]


@pytest.mark.parametrize("kind", ["one", "two", "more", "first"])
def test_hooks_keep_the_form_of_a_blocks_output(kind, table, saved):
    model, served = nn.ModuleDict(dict(layers=nn.ModuleList(Block(kind) for _ in range(DEPTH)))), Served(table)
    serving.attach(model, served, DEPTH)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = Block(kind)(x)
    assert type(model["layers"][1](x)) is type(plain)
    served.begin([(Ask("caa", "T", 2.), 3, 0, None)], [3])
    out = model["layers"][1](x)
    parts = (out,) if kind == "one" else out
    assert len(parts) == (1 if kind == "one" else len(plain)) and (kind != "more" or out[2] == "more")
    whole = sum(p for p in parts if isinstance(p, torch.Tensor))
    before = sum(p for p in ((plain,) if kind == "one" else plain) if isinstance(p, torch.Tensor))
    torch.testing.assert_close(whole[2], ods.load_steerer(saved/"caa").steer(before[2], T=2.))
    assert torch.equal(whole[:2], before[:2])
    served.end()


def test_a_function_is_wrapped_once_and_wherever_it_was_imported(monkeypatch):
    home, other = ModuleType("vllm.home"), ModuleType("vllm.other")
    def f(x): return x
    home.f = other.f = f
    monkeypatch.setitem(sys.modules, "vllm.home", home)
    monkeypatch.setitem(sys.modules, "vllm.other", other)
    for _ in range(2): serving._wrap(home, "f", lambda old: lambda x: old(x) + 1)
    assert home.f(1) == other.f(1) == 2
    with pytest.raises(RuntimeError, match="does not know this version of vLLM: no vllm.home.gone"): serving._wrap(home, "gone", None)


def test_the_plugin_is_declared():
    from .test_project import settings
    assert settings()["vllm_plugins"] == "odesteer=odesteer.serving:register" and callable(serving.register)


# The glue, in a vLLM of paper

@pytest.fixture
def paper(monkeypatch, saved):
    "Modules with the names that the plugin touches, and an engine made of them"
    def module(name, **members):
        monkeypatch.setitem(sys.modules, name, made := ModuleType(name))
        vars(made).update(members)
        return made
    class EngineArgs:
        def __init__(self, **extra): self.extra = extra
        def create_engine_config(self): return engine(additional_config=self.extra)
    class InputProcessor:
        def __init__(self, config): self.vllm_config = config
        def process_inputs(self, request_id, prompt, params): return params.extra_args
    class WorkerWrapperBase:
        def __init__(self, config): self.vllm_config = config
        def init_device(self): return "ready"
    class GPUModelRunner:
        def __init__(self, config):
            self.vllm_config, self.model_config, self.input_batch, self.requests = config, config.model_config, None, {}
            self.model = nn.ModuleDict(dict(layers=nn.ModuleList(Block("two") for _ in range(DEPTH))))
        def load_model(self): pass
        def get_model(self): return self.model
        def _prepare_inputs(self, scheduler_output, scheduled): return "prepared"
        def execute_model(self, x, scheduled):
            self._prepare_inputs(None, scheduled)
            return [layer(x) for layer in self.model["layers"]]
    class Chat:
        vllm_xargs = {"odesteer": "caa"}
        def to_beam_search_params(self): return "beams"
    def generate_block_hash_extra_keys(request, start, end, mm): return (("lora", "a"),) if request.lora else None, mm
    keys = module("vllm.v1.core.kv_cache_utils", generate_block_hash_extra_keys=generate_block_hash_extra_keys)
    for name in ("vllm", "vllm.engine", "vllm.v1", "vllm.v1.core", "vllm.v1.engine", "vllm.v1.worker", "vllm.entrypoints"): module(name)
    sys.modules["vllm.v1.core"].kv_cache_utils = keys
    module("vllm.v1.core.block_pool", generate_block_hash_extra_keys=generate_block_hash_extra_keys)
    module("vllm.engine.arg_utils", EngineArgs=EngineArgs)
    module("vllm.v1.engine.input_processor", InputProcessor=InputProcessor)
    module("vllm.v1.worker.worker_base", WorkerWrapperBase=WorkerWrapperBase)
    module("vllm.v1.worker.gpu_model_runner", GPUModelRunner=GPUModelRunner)
    module("vllm.entrypoints.chat.protocol", Chat=Chat)
    module("vllm.exceptions", VLLMValidationError=type("VLLMValidationError", (Exception,), {}))
    module("vllm.platforms", current_platform=SimpleNamespace(device_name="cpu", is_cpu=lambda: False))
    return SimpleNamespace(EngineArgs=EngineArgs, InputProcessor=InputProcessor, Worker=WorkerWrapperBase, Runner=GPUModelRunner, Chat=Chat, keys=keys,
                           refused=sys.modules["vllm.exceptions"].VLLMValidationError)


class Params(SimpleNamespace):
    def clone(self): return Params(**vars(self))


def test_an_engine_without_steerers_is_as_it_was(paper):
    serving.register()
    config = paper.EngineArgs().create_engine_config()
    assert config.additional_config == {} and config.parallel_config.worker_extension_cls == ""
    before = vars(paper.Runner).copy()
    assert paper.Worker(config).init_device() == "ready" and vars(paper.Runner).items() == before.items()
    extra = {"other": 1}
    assert paper.InputProcessor(config).process_inputs("r", "p", Params(extra_args=extra)) is extra
    with pytest.raises(paper.refused, match="this server has no steerers"): paper.InputProcessor(config).process_inputs("r", "p", Params(extra_args={"odesteer": "caa"}))
    request = SimpleNamespace(sampling_params=Params(extra_args=None), num_prompt_tokens=3, lora=True)
    assert paper.keys.generate_block_hash_extra_keys(request, 0, 8, 5) == ((("lora", "a"),), 5)


def test_an_engine_with_steerers_from_the_request_to_the_rows(paper, saved, table):
    serving.register()
    serving.register()  # vLLM may call it twice
    config = paper.EngineArgs(odesteer={"caa": str(saved/"caa")}, odesteer_collect=[1]).create_engine_config()
    front, params = paper.InputProcessor(config), Params(extra_args={"odesteer": "caa", "odesteer_strength": 2})
    form = front.process_inputs("r", "p", params)
    assert asked(form)[0] == Ask("caa", "T", 2., table["caa"]["id"]) and params.extra_args == {"odesteer": "caa", "odesteer_strength": 2}, "the caller's own is not changed"
    for extra in ({"odesteer": "nope"}, {"odesteer_ask": ["caa", "T", 1., ""]}):
        with pytest.raises(paper.refused): front.process_inputs("r", "p", Params(extra_args=extra))
    with pytest.raises(paper.refused, match="beam search"): paper.Chat().to_beam_search_params()
    paper.Chat.vllm_xargs = None
    assert paper.Chat().to_beam_search_params() == "beams"

    request = SimpleNamespace(sampling_params=Params(extra_args=form), num_prompt_tokens=8, lora=False)
    for home in (paper.keys, sys.modules["vllm.v1.core.block_pool"]):
        assert home.generate_block_hash_extra_keys(request, 0, 7, 5) == (None, 5)
        (kind, key), = home.generate_block_hash_extra_keys(request, 0, 8, 5)[0]
        assert kind == "odesteer" and key == cache_key(asked(form)[0], 8, 8)
    request.lora = True
    assert len(paper.keys.generate_block_hash_extra_keys(request, 0, 8, 5)[0]) == 2
    request.sampling_params = None  # of a model that generates nothing
    assert paper.keys.generate_block_hash_extra_keys(request, 0, 8, 5)[0] == (("lora", "a"),)

    paper.Worker(config).init_device()
    runner = paper.Runner(config)
    runner.load_model()
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    read = front.process_inputs("r", "p", Params(extra_args={"odesteer_collect": ["mine", [1]]}))
    runner.input_batch = SimpleNamespace(req_ids=["a", "b"], num_prompt_tokens=[3, 2], num_computed_tokens_cpu=[0, 0])
    runner.requests = {"a": Params(sampling_params=Params(extra_args=form)), "b": Params(sampling_params=Params(extra_args=read))}
    out = runner.execute_model(x, [3, 2])
    assert [i for i in range(5) if not torch.equal(sum(out[1])[i], sum(out[0])[i])] == [2]
    torch.testing.assert_close(sum(out[1])[2], ods.load_steerer(saved/"caa").steer(3 * x[2], T=2.))
    worker = serving.Extension()
    worker.model_runner = runner
    (name, layer, blob), = worker.odesteer_kept()
    assert (name, layer) == ("mine", 1) and torch.equal(torch.frombuffer(bytearray(blob), dtype=torch.float32), 3 * x[4]) and worker.odesteer_kept() == []
    assert worker.odesteer_applied() == 1
    runner.model["layers"][1]._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="1 rows were to be steered"): runner.execute_model(x, [3, 2])


@pytest.mark.parametrize("gone", ["vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys", "vllm.v1.engine.input_processor.InputProcessor", "vllm.v1.worker.worker_base.WorkerWrapperBase"])
def test_a_vllm_that_is_not_known_stops_those_who_steer_and_nobody_else(gone, paper, saved, recwarn):
    home, _, name = gone.rpartition(".")
    delattr(sys.modules[home], name)
    serving.register()
    assert paper.EngineArgs().create_engine_config().additional_config == {}
    with pytest.raises(RuntimeError, match="install vllm"): paper.EngineArgs(odesteer={"caa": str(saved/"caa")}).create_engine_config()


def test_a_vllm_without_an_engine_is_left_alone(paper):
    del paper.EngineArgs.create_engine_config
    with pytest.warns(UserWarning, match="steering is off.*EngineArgs.create_engine_config"): serving.register()


# The command

def test_the_command_that_starts_a_server(saved, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    command, env = serve_command("MODEL", {"a": saved/"caa", "b": {"path": saved/"ode", "layer": 3}}, ["--port", "81"])
    told = json.loads(command[command.index("--additional-config") + 1])["odesteer"]
    assert told == {"a": {"path": str(saved/"caa"), "layer": 1}, "b": {"path": str(saved/"ode"), "layer": 3}} and command[-2:] == ["--port", "81"]
    assert "--enforce-eager" in command and env == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert "--enforce-eager" not in serve_command("M", {"a": saved/"caa"}, ["--no-enforce-eager"])[0]
    for allowed, ours in (("mine", "mine,odesteer"), ("", "odesteer"), ("odesteer,mine", None)):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        assert serve_command("M", {"a": saved/"caa"})[1].get("VLLM_PLUGINS") == ours, "a list of plugins that leaves this one out would steer nothing"
    for extra in (["--additional-config", "{}"], ["--additional_config={}"]):
        with pytest.raises(ValueError, match="--steerer"): serve_command("M", {"a": saved/"caa"}, extra)


def test_serve_in_the_shell(saved, capsys):
    assert main(["serve", "M", "--steerer", f"a={saved/'caa'},layer=-1", "--print", "--", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("--dtype float32\n") and '"layer": -1' in out and "VLLM_USE_V2_MODEL_RUNNER=0" in out
    for given, why in ((["a"], "write it as NAME=PATH"), ([f"a={saved/'caa'},layer=x"], "write it as NAME=PATH"), ([f"a={saved}/nowhere"], "no folder")):
        assert main(["serve", "M", "--steerer", *given, "--print"]) == 2
        assert why in capsys.readouterr().err
    assert main(["serve", "smollm2", "--steerer", f"a={saved/'caa'}", "--print"]) == 2 and "save_pretrained(FOLDER)" in capsys.readouterr().err
    assert main(["serve", "M"]) == 2 and "--steerer" in capsys.readouterr().err


def test_serve_without_vllm_says_how_to_get_it(saved, capsys, monkeypatch):
    monkeypatch.setattr("odesteer.commands.find_spec", lambda name: None)
    assert main(["serve", "M", "--steerer", f"a={saved/'caa'}"]) == 2
    assert capsys.readouterr().err == "odesteer: serving needs vLLM, in an environment of its own: pip install 'odesteer[vllm]'\n"


def test_serve_where_vllm_would_not_see_the_plugin(saved, capsys, monkeypatch):
    monkeypatch.setattr("odesteer.commands.find_spec", lambda name: True)
    monkeypatch.setattr("odesteer.commands.entry_points", lambda group: [])
    monkeypatch.setattr("os.execvpe", lambda *_: pytest.fail("a server that steers nothing was started"))
    assert main(["serve", "M", "--steerer", f"a={saved/'caa'}"]) == 2
    assert "would not find odesteer's plugin" in capsys.readouterr().err
