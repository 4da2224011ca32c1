"Vectors to and from other programs, and steerers on a hub: nothing changes on the way, and whatever is wrong is one sentence"
import json
import pickle
import re
import struct
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer.check import check_steerer
from odesteer.cli import main
from odesteer.share import FORMATS, export_vectors, import_vectors, is_constant, model_card, pushes, steering_cost

from .hub import TOKEN, hub
from .sharing import PROGRAMS, compared, of_case, ours

READ = [name for name in FORMATS if name != "lm-eval"]  # the formats that are read as well


def data(seed=0, n=40, d=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, d, generator=g)
    return x[0] + torch.linspace(0, 1, d), x[1]


def fitted(name, seed=0, layer=3, **params):
    steerer = ods.make_steerer(name, **params).fit(*data(seed))
    steerer.about.update(model="owner/model", revision="0" * 40, layer=layer, site=f"output of model.layers.{layer}", positions="last")
    return steerer


SMALL = dict(n_components=64, steps=3)


# There and back

@pytest.mark.parametrize("to", READ)
@pytest.mark.parametrize("method", ["caa", "iti", "repe", "random"])
def test_a_vector_comes_back_as_it_was(to, method, tmp_path):
    steerer, file = fitted(method), tmp_path/f"v{FORMATS[to].suffix}"
    lost = export_vectors(steerer, file, to)
    (layer, back), = import_vectors(file).items()
    assert layer == 3 and torch.equal(back.vector, pushes(steerer)[0][3])
    a = data(9)[0]
    torch.testing.assert_close(back.steer(a, T=1.), steerer.steer(a, **steerer.default_strength))
    torch.testing.assert_close(back.steer(a, spread=.7), steerer.steer(a, spread=.7))
    torch.testing.assert_close(back.steer(a, share=-.2), steerer.steer(a, share=-.2))
    assert back.about["model"] == "owner/model" and back.about["layer"] == 3 and back.about["vector_of"] == method
    assert any("which tokens" in line for line in lost) == FORMATS[to].tokens.startswith("all") and not any("depends" in line for line in lost)


@pytest.mark.parametrize("to", READ)
def test_several_blocks_and_one_of_them(to, tmp_path):
    file = tmp_path/f"v{FORMATS[to].suffix}"
    export_vectors({2: fitted("caa"), 1: fitted("caa", 1), 11: fitted("caa", 2)}, file, to)
    back = import_vectors(file)
    assert list(back) == [1, 2, 11] and all(torch.equal(back[t].vector, pushes(fitted("caa", s))[0][3]) for t, s in ((2, 0), (1, 1), (11, 2)))
    assert list(import_vectors(file, layer=11)) == [11]
    with pytest.raises(ValueError, match="no vector for block 3: it has 1, 2, 11"): import_vectors(file, layer=3)


def test_strength_is_settled_in_the_file(tmp_path):
    caa, iti = fitted("caa"), fitted("iti")
    full = pushes(caa)[0][3]
    torch.testing.assert_close(full, caa.mean_pos_ - caa.mean_neg_)
    torch.testing.assert_close(pushes(caa, {"T": -2.})[0][3], -2 * full)
    torch.testing.assert_close(pushes(caa, {"spread": .5})[0][3].norm(), .5 * caa.spread_)
    torch.testing.assert_close(pushes(iti)[0][3].norm(), .5 * iti.spread_)
    torch.testing.assert_close(pushes(iti, {"share": .1})[0][3].norm(), .1 * iti.median_norm_)
    export_vectors(iti, tmp_path/"v.safetensors", strength={"T": 3.})
    back = import_vectors(tmp_path/"v.safetensors")[3]
    torch.testing.assert_close(back.vector.norm(), torch.tensor(3.))
    assert back.about["taken_at"] == "T=3"
    with pytest.raises(ValueError, match="no push"): pushes(caa, {"T": 0.})
    with pytest.raises(ValueError, match="default strengths"): pushes({1: caa, 2: iti})
    assert list(pushes({1: caa, 2: iti}, {"spread": 1.})[0]) == [1, 2]


def test_a_field_is_taken_where_one_asks_and_that_is_said(tmp_path):
    steerer, at = fitted("odesteer", **SMALL), data(5)[1]
    assert not is_constant(steerer) and is_constant(fitted("caa"))
    with pytest.raises(ValueError, match="depends on the activation"): export_vectors(steerer, tmp_path/"v.gguf")
    assert not (tmp_path/"v.gguf").exists()
    lost = export_vectors(steerer, tmp_path/"v.gguf", at=at, strength={"spread": 1.})
    assert "depends on the activation" in lost[0] and "barrier" in lost[0]
    v = steerer.vector_field(at).mean(0)
    torch.testing.assert_close(import_vectors(tmp_path/"v.gguf")[3].vector, v / v.norm() * steerer.spread_)
    one = pushes(steerer, {"T": 2.}, at=at[0])[0][3]
    torch.testing.assert_close(one, 2 * steerer.vector_field(at[0]), atol=1e-5, rtol=1e-5)
    assert not pushes(fitted("caa"), at=at)[1]["reference"]  # a constant field loses nothing


def test_controllers(tmp_path):
    lm = ods.load_micro()
    texts = lm.world.contrast("truth")
    some = texts.pos[:8], texts.neg[:8]
    pid = ods.PIDAcT().fit(lm.model, lm.tokenizer, *some, progress=False)
    export_vectors(pid, tmp_path/"v.safetensors", strength={"T": .5})
    back = import_vectors(tmp_path/"v.safetensors")
    assert list(back) == [0, 1, 2, 3] and all(torch.allclose(v.vector, .5 * pid.push_[t]) for t, v in back.items())
    with pytest.raises(ValueError, match="block 0"): export_vectors(pid, tmp_path/"v.gguf", "gguf")
    export_vectors(pid, tmp_path/"v.gguf", "repeng")
    assert list(import_vectors(tmp_path/"v.gguf")) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="depends on the state at every block"): export_vectors(ods.SPID().fit(lm.model, lm.tokenizer, *some, progress=False), tmp_path/"w.gguf")
    def answers(what, T):
        with ods.steering(lm.model, what, T=T): return ods.generate_text(lm.model, lm.tokenizer, [p.text for p in lm.world.prompts("truth", "test")[:6]], max_new_tokens=8, do_sample=False)
    assert answers(back, 2.) == answers(pid, 1.)


def test_formats_go_by_name_or_suffix(tmp_path):
    caa = fitted("caa")
    with pytest.raises(ValueError, match="give to= one of safetensors, gguf"): export_vectors(caa, tmp_path/"v.bin")
    with pytest.raises(ValueError, match="no format 'ggml'"): export_vectors(caa, tmp_path/"v.gguf", "ggml")
    with pytest.raises(ValueError, match="for lm-eval must end in .pt"): export_vectors(caa, tmp_path/"v.gguf", "lm-eval")
    with pytest.raises(ValueError, match="layer="): export_vectors(ods.CAA().fit(*data()), tmp_path/"v.gguf")
    with pytest.raises(RuntimeError, match="not fitted"): export_vectors(ods.CAA(), tmp_path/"v.gguf")
    assert not list(tmp_path.iterdir())
    export_vectors(caa, tmp_path/"v.gguf")
    export_vectors(caa, tmp_path/"w.gguf", "gguf")
    assert (tmp_path/"v.gguf").read_bytes() == (tmp_path/"w.gguf").read_bytes()


def test_steerers_of_one_block_are_one_vector(tmp_path):
    one, two = fitted("caa"), fitted("caa", 1)
    torch.testing.assert_close(pushes({3: [one, two]})[0][3], pushes(one)[0][3] + pushes(two)[0][3])
    ablation = ods.make_steerer("ablation", of=torch.ones(12))
    gate = ods.make_steerer("gate", steerer=one, when=two)
    for other in (ablation, gate):
        assert not is_constant(other)
        with pytest.raises(ValueError, match="depends on"): export_vectors(other, tmp_path/"v.gguf", layer=3)
        assert "Nothing was measured" in model_card(other) and max(map(len, model_card(other).split("\n"))) < 600


def test_like_gives_the_units(tmp_path):
    vector = ods.SteeringVector(torch.ones(12), layer=3)
    export_vectors(vector, tmp_path/"v.safetensors")
    assert import_vectors(tmp_path/"v.safetensors")[3].strength_units == ("T",)
    caa = fitted("caa")
    back = import_vectors(tmp_path/"v.safetensors", like=caa)[3]
    torch.testing.assert_close((back.steer(torch.zeros(12), spread=1.)).norm(), caa.spread_)
    with pytest.raises(ValueError, match="width"): import_vectors(tmp_path/"v.safetensors", like=ods.CAA().fit(*data(d=5)))
    back.save_pretrained(tmp_path/"s")
    assert torch.equal(ods.load_steerer(tmp_path/"s").vector, vector.vector)


def test_wide_numbers_are_written_in_single_precision(tmp_path):
    pos, neg = data()
    caa = ods.CAA().fit(pos.double(), neg.double())
    for to in READ:
        export_vectors(caa, tmp_path/f"v{FORMATS[to].suffix}", to, layer=2)
        assert import_vectors(tmp_path/f"v{FORMATS[to].suffix}")[2].vector.dtype == torch.float32


# What the files are

def test_a_gguf_file_is_the_control_vector_of_llama_cpp(tmp_path):
    from gguf import GGUFReader
    caa = fitted("caa")
    for to in ("gguf", "repeng", "easysteer"):
        export_vectors({3: caa, 5: caa}, tmp_path/"v.gguf", to)
        reader = GGUFReader(tmp_path/"v.gguf")
        head = {k: f.contents() for k, f in reader.fields.items()}
        assert head["general.architecture"] == "controlvector" and head["controlvector.layer_count"] == 2 and head["controlvector.model_hint"] == "unknown"
        assert [t.name for t in reader.tensors] == ["direction.3", "direction.5"] and all(t.tensor_type.name == "F32" and t.data.shape == (12,) for t in reader.tensors)
        np.testing.assert_array_equal(reader.tensors[0].data, pushes(caa)[0][3].numpy())
    assert json.loads(head["controlvector.easysteer"]) == {"version": 1, "component": "hidden_states", "metadata": {"mapping": []}} and head["controlvector.method"] == "caa"


@pytest.mark.parametrize(("site", "name"), [("output of model.layers.3", "layers.3"), ("output of transformer.h.3", "h.3"), ("output of gpt_neox.layers.3", "layers.3"),
                                            ("output of model.language_model.layers.3", "language_model.layers.3"), (None, "layers.3")])
def test_lm_eval_gets_plain_tensors_under_its_names(site, name, tmp_path):
    caa = fitted("caa")
    caa.about["site"] = site
    export_vectors(caa, tmp_path/"v.pt")
    found = torch.load(tmp_path/"v.pt", weights_only=True)
    assert found.keys() == {name} and torch.equal(found[name].pop("steering_vector"), pushes(caa)[0][3])
    assert found[name] == dict(steering_coefficient=1., action="add", bias=None, head_index=None)


def write_gguf(file, tensors, arch="controlvector", **texts):
    from gguf import GGUFWriter
    writer = GGUFWriter(file, arch)
    writer.add_string("controlvector.model_hint", "llama")
    for k, v in texts.items(): writer.add_string(f"controlvector.{k}", v)
    for k, v in tensors.items(): writer.add_tensor(k, v)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_of_others(tmp_path):
    from safetensors.torch import save_file
    v = torch.arange(1., 9)
    write_gguf(tmp_path/"v.gguf", {"direction.1": v.numpy(), "direction.2": v.half().numpy(), "direction.3": np.zeros(8, np.float32)})
    back = import_vectors(tmp_path/"v.gguf")
    assert list(back) == [1, 2] and all(torch.equal(x.vector, v) for x in back.values())  # a vector of zeros pushes nothing
    save_file({"7": v, "some.layers.13": v.bfloat16()[None]}, tmp_path/"v.safetensors")
    back = import_vectors(tmp_path/"v.safetensors")
    assert list(back) == [7, 13] and all(torch.equal(x.vector, v) and x.about == {"layer": t} for t, x in back.items())
    save_file({"layers.7": v}, tmp_path/"v.gguf", metadata={"odesteer": json.dumps({"spread": {"7": -1., "8": "x"}, "median_norm": [1], "model": ["x"]})})
    back = import_vectors(tmp_path/"v.gguf")[7]  # known by how it begins; what makes no sense in its head is left aside
    assert back.strength_units == ("T",) and back.about == {"layer": 7}
    for head in ("{", "[]", "[" * 50_000, "null"):
        save_file({"layers.7": v}, tmp_path/"v.safetensors", metadata={"odesteer": head})
        assert list(import_vectors(tmp_path/"v.safetensors")) == [7]


# What is refused

class Evil:
    def __reduce__(self): return (open, ("evil", "w"))


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.1": torch.ones(4), "evil": Evil()}, "v.pt")
    (tmp_path/"v.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), "old.pt", _use_new_zipfile_serialization=False)
    for name in ("v.pt", "v.pkl", "old.pt"):
        for other in (name, "v.safetensors", "v.gguf"):
            (tmp_path/other).write_bytes((tmp_path/name).read_bytes())
            with pytest.raises(ValueError, match="is a pickle.*save_file"): import_vectors(other)
    assert not (tmp_path/"evil").exists()


@pytest.mark.parametrize(("tensors", "said"), [
    ({"layers.1": torch.ones(4), "layers.2": torch.ones(5)}, r"widths \[4, 5\]"), ({"layers.1": torch.ones(4), "direction.1": torch.ones(4)}, "two vectors for block 1"),
    ({"layers.1": torch.tensor([1., torch.nan])}, "NaN or infinity in layers.1"), ({"layers.1": torch.tensor([1., torch.inf])}, "NaN or infinity"),
    ({"layers.1": torch.ones(4, 4)}, r"shape \(4, 4\)"), ({"layers.1": torch.ones(4, dtype=torch.int32)}, "int32"), ({"layers.1": torch.zeros(4)}, "but zeros"), ({}, "holds no vector"),
    ({"layers.1.weight": torch.ones(4)}, "layers.1.weight"), ({"layers.-1": torch.ones(4)}, "layers.-1"), ({"layers.1": torch.ones(0)}, "zeros|shape")])
def test_vectors_that_make_no_sense(tensors, said, tmp_path):
    from safetensors.torch import save_file
    save_file(tensors, tmp_path/"v.safetensors")
    with pytest.raises(ValueError, match=said): import_vectors(tmp_path/"v.safetensors")


def test_other_files(tmp_path):
    v = np.ones(4, np.float32)
    write_gguf(tmp_path/"v.gguf", {"direction.1": v}, arch="llama")
    with pytest.raises(ValueError, match="of 'llama', not of a control vector"): import_vectors(tmp_path/"v.gguf")
    write_gguf(tmp_path/"v.gguf", {"direction.1": v}, easysteer=json.dumps({"component": "attention_heads"}))
    with pytest.raises(ValueError, match="attention_heads"): import_vectors(tmp_path/"v.gguf")
    write_gguf(tmp_path/"v.gguf", {"blk.1.attn_q": v})
    with pytest.raises(ValueError, match="attn_q"): import_vectors(tmp_path/"v.gguf")
    for blob in (b"", b"GGUF", b"hello, this is a text", b"\0" * 40, (8).to_bytes(8, "little") + b"{}      ", (2**60).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{]"):
        (tmp_path/"v.safetensors").write_bytes(blob)
        with pytest.raises(ValueError, match="v.safetensors"): import_vectors(tmp_path/"v.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"): import_vectors(tmp_path/"nowhere.gguf")
    with pytest.raises(FileNotFoundError, match="no file"): import_vectors(tmp_path)


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_damage_is_one_error_and_quick(to, tmp_path):
    file, rng = tmp_path/f"v{FORMATS[to].suffix}", np.random.default_rng(0)
    export_vectors({2: fitted("caa"), 3: fitted("caa", 1)}, file, to)
    whole, start, refused = file.read_bytes(), time.perf_counter(), 0
    head = 600 if to == "gguf" else 400
    for i in range(400):
        blob = bytearray(whole)
        if i % 4 == 0: blob = blob[:rng.integers(len(blob))]
        else:
            for at in rng.integers(head, size=1 + i % 3): blob[at] = rng.integers(256)
        file.write_bytes(blob)
        try: import_vectors(file)
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 150 and time.perf_counter() - start < 30


def test_a_length_that_lies_does_not_keep_the_reader_busy(tmp_path):
    for count in (2**62, 2**31):
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        key = b"controlvector.list"
        (tmp_path/"v.gguf").write_bytes(head + struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 4, count) + b"\0" * 64)
        start = time.perf_counter()
        with pytest.raises(ValueError, match="damaged"): import_vectors(tmp_path/"v.gguf")
        assert time.perf_counter() - start < 5


# In the other programs

@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("case", ["CAA", "PID-AcT"])
def test_the_other_program_gives_the_same_tokens(name, case, tmp_path):
    if not find_spec(PROGRAMS[name][1]): pytest.skip(f"{PROGRAMS[name][1]} is not installed")
    if name == "repeng" and not hasattr(np, "float_"): pytest.skip("repeng 0.4.0 does not know NumPy 2")
    lm = ods.load_micro()
    found = compared(lm, name, of_case(lm, case), tmp_path, step=40)
    assert found["same"] == found["tokens"] == 60 and found["changed"] > 30
    assert found["logprob"] < (.1 if name == "gguf" else 1e-4)  # llama.cpp keeps keys and values in half precision


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_block_off_would_be_seen(name, tmp_path):
    "The numbers mean what the table says: with the neighbour's number the other program agrees with us at the neighbour, and only there"
    if not find_spec(PROGRAMS[name][1]): pytest.skip(f"{PROGRAMS[name][1]} is not installed")
    if name == "repeng" and not hasattr(np, "float_"): pytest.skip("repeng 0.4.0 does not know NumPy 2")
    lm = ods.load_micro()
    caa, ids = of_case(lm, "CAA"), lm.tokenizer(lm.world.prompts("truth", "test")[0].text)["input_ids"]
    for block in (1, 2, 3):
        file = tmp_path/f"v{FORMATS[name].suffix}"
        export_vectors(caa, file, name, layer=block)
        with PROGRAMS[name][0](lm, file) as logits_of: theirs = logits_of(ids).log_softmax(-1)
        for other in (0, 1, 2, 3):
            with ours(lm, {other: ods.SteeringVector(caa.mean_pos_ - caa.mean_neg_)}) as logits_of: off = (theirs - logits_of(ids).log_softmax(-1)).abs().max()
            assert off < .1 if other == block else off > 1


def test_pyvene_pushes_the_prompt_when_it_is_told_to(tmp_path):
    pytest.importorskip("pyvene")
    import pyvene
    lm = ods.load_micro()
    caa, how = of_case(lm, "CAA"), dict(max_new_tokens=8, do_sample=False)
    export_vectors(caa, tmp_path/"v.safetensors", "pyvene")
    inputs = [lm.tokenizer(p.text, return_tensors="pt").input_ids for p in lm.world.prompts("truth", "test")[::20]]
    with ods.steering(lm.model, caa, layer=1, T=1., positions="all"): mine = [lm.model.generate(ids, **how).tolist() for ids in inputs]
    space = dict(pyvene=pyvene, model=lm.model)
    exec(FORMATS["pyvene"].use.replace("FILE", str(tmp_path/"v.safetensors")), space)
    theirs = {told: [space["steered"].generate({"input_ids": ids}, intervene_on_prompt=told, **how)[1].tolist() for ids in inputs] for told in (True, False)}
    assert theirs[True] == mine != theirs[False]


# The hub

@pytest.fixture
def held(monkeypatch, tmp_path):
    with hub(monkeypatch, tmp_path/"cache") as held: yield held


def test_push_and_pull(held, tmp_path):
    first, second = fitted("odesteer", **SMALL), fitted("caa", 1)
    one = first.push_to_hub("me/truth", token=TOKEN)
    repo = held.repos["me/truth"]
    assert repo["branches"]["main"] == one and repo["commits"][one].keys() == {".gitattributes", "README.md", "card.json", "steerer.safetensors"}
    first.save_pretrained(tmp_path/"here")
    assert (tmp_path/"here"/"card.json").read_bytes() == repo["commits"][one]["card.json"]
    a, back = data(3)[0], ods.load_steerer("me/truth")
    assert back.card == first.card and torch.equal(back.steer(a, spread=1.), first.steer(a, spread=1.))
    two = second.push_to_hub("me/truth", token=TOKEN)
    assert one != two and isinstance(ods.load_steerer("me/truth"), ods.CAA) and isinstance(ods.CAA.from_pretrained("me/truth"), ods.CAA)
    assert isinstance(ods.load_steerer("me/truth", revision=one), ods.ODESteer) and isinstance(ods.load_steerer("me/truth", revision=two), ods.CAA)
    with pytest.raises(ValueError, match="holds CAA"): ods.ODESteer.from_pretrained("me/truth")
    three = first.push_to_hub("me/truth", revision="trial", token=TOKEN)
    assert isinstance(ods.load_steerer("me/truth", revision="trial"), ods.ODESteer) and isinstance(ods.load_steerer("me/truth"), ods.CAA)
    first.push_to_hub("me/truth", revision="trial", token=TOKEN)  # the branch is there already
    assert repo["branches"]["main"] == two and three in repo["commits"]


def test_what_the_hub_refuses_is_one_sentence(held, monkeypatch):
    caa = fitted("caa")
    for token in ("hf_wrong", None):
        with pytest.raises(PermissionError, match=re.escape("the hub does not let you write to me/truth (HTTP 401): log in with `hf auth login`")): caa.push_to_hub("me/truth", token=token)
    assert not held.repos
    commit = caa.push_to_hub("me/truth", token=TOKEN)
    with pytest.raises(PermissionError, match="HTTP 401"): caa.push_to_hub("me/truth", token="hf_wrong")  # a public repository that is there
    assert list(held.repos["me/truth"]["commits"])[-1] == commit
    for name in ("truth", "me/truth/too", "me/", "/truth", "me/a b", 3):
        with pytest.raises(ValueError, match="no name on the hub"): caa.push_to_hub(name, token=TOKEN)
    with pytest.raises(FileNotFoundError, match="the hub has me/truth, but no revision 'never' of it: give one of"): ods.load_steerer("me/truth", revision="never")
    with pytest.raises(FileNotFoundError, match=r"RepositoryNotFoundError\); if it is private, log in"): ods.load_steerer("me/other")
    with pytest.raises(RuntimeError, match="not fitted"): ods.CAA().push_to_hub("me/truth", token=TOKEN)
    caa.push_to_hub("me/secret", private=True, token=TOKEN)
    with pytest.raises(FileNotFoundError, match="private"): ods.load_steerer("me/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert isinstance(ods.load_steerer("me/secret"), ods.CAA)


def test_without_a_network(monkeypatch, tmp_path):
    caa = fitted("caa")
    with hub(monkeypatch, tmp_path/"cache"): commit = (caa.push_to_hub("me/truth", token=TOKEN), ods.load_steerer("me/truth"))[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(ods.load_steerer("me/truth").mean_pos_, caa.mean_pos_) and ods.load_steerer("me/truth", revision=commit).card == caa.card
    with pytest.raises(FileNotFoundError, match="me/other"): ods.load_steerer("me/other")
    with pytest.raises(ConnectionError, match="the hub could not be reached for me/truth"): caa.push_to_hub("me/truth", token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="the hub could not be reached for me/truth"): caa.push_to_hub("me/truth", token=TOKEN)


def test_a_path_of_this_machine_is_not_published_in_silence(held, tmp_path):
    caa = fitted("caa")
    caa.about["model"] = str(tmp_path)
    with pytest.warns(UserWarning, match="model = .*a path of this machine"): commit = caa.push_to_hub("me/truth", token=TOKEN)
    assert str(tmp_path) not in held.repos["me/truth"]["commits"][commit]["README.md"].decode()


# Its card

def test_the_card_says_what_was_measured():
    from huggingface_hub import ModelCard
    steerer, (pos, neg) = fitted("caa"), data(7, n=120)
    report = check_steerer(steerer, pos, neg)
    text = model_card(steerer, "me/truth", report)
    card = ModelCard(text)
    assert card.data.library_name == "odesteer" and card.data.base_model == "owner/model" and {"odesteer", "caa"} <= set(card.data.tags)
    for e, s in zip(report.dose, report.strengths): assert f"| {s:g} | {e.value:+.3f} | {e.lo:+.3f} to {e.hi:+.3f} |" in text
    for kind, p in report.placebos.items(): assert f"| {kind} | {p.mean():+.3f} | {p.max():+.3f} |" in text
    for passed, said in report.findings: assert said in text
    assert "| block | 3 |" in text and "40 wanted and 40 unwanted activations" in text and "kB" in text
    assert "ods.load_model('owner/model', revision='0000" in text and "layer=3, spread=0.5" in text
    with pytest.raises(ValueError, match="another steerer"): model_card(fitted("caa", 1), report=report)


def test_a_card_without_a_check_says_so():
    steerer = fitted("iti")
    text = model_card(steerer)
    assert "Nothing was measured" in text and "spread=0.5" in text
    weak = check_steerer(ods.RandomDirection().fit(*data()), *data(7, n=120))
    assert all(e.lo <= 0 for e in weak.dose) == ("At no strength tried" in model_card(ods.RandomDirection().fit(*data()), report=weak))
    bare = model_card(ods.SteeringVector(torch.ones(4)))
    assert "base_model" not in bare and "layer=..., T=1" in bare and "None" not in bare
    assert all(0 < t < 1e5 for t in steering_cost(steerer).values())


def test_every_method_has_a_card_and_can_be_pushed(held):
    lm = ods.load_micro()
    texts = lm.world.contrast("truth")
    pid = ods.PIDAcT().fit(lm.model, lm.tokenizer, texts.pos[:6], texts.neg[:6], progress=False)
    pid.about["model"] = "owner/model"
    pid.push_to_hub("me/pid", token=TOKEN)
    readme = next(files["README.md"].decode() for files in reversed(held.repos["me/pid"]["commits"].values()))
    assert "layer=" not in readme and "T=1" in readme and "6 wanted and 6 unwanted texts" in readme
    assert torch.equal(ods.load_steerer("me/pid").push_, pid.push_)


# The shell

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("share")
    lm = ods.load_micro()
    lm.model.save_pretrained(folder/"model")
    lm.tokenizer.save_pretrained(folder/"model")
    for split in ("train", "val"):
        texts = lm.world.contrast("truth", split)
        rows = [dict(pos=p, neg=n, group=str(g)) for p, n, g in zip(texts.pos[:120], texts.neg, texts.pos_groups)]
        (folder/f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder/"prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p.text}) for p in lm.world.prompts("truth", "test")[:8]))
    from odesteer.data import fit_steerer
    for name, method in (("bent", "odesteer"), ("straight", "caa")):
        steerer = fit_steerer(lm.model, lm.tokenizer, lm.world.contrast("truth"), method, 1, **(SMALL if method == "odesteer" else {}))
        steerer.about["model"] = "model"
        steerer.save_pretrained(folder/name)
    return folder


def sh(capsys, line) -> tuple:
    code = main(line.split())
    said = capsys.readouterr()
    return code, said.out + said.err


def test_export_and_import_in_a_shell(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code, said = sh(capsys, "export straight --spread 0.5 --out v.gguf")
    assert code == 0 and "a scale of 1 is spread = 0.5" in said and "not in the file: which tokens" in said and "--control-vector v.gguf" in said
    code, said = sh(capsys, "import v.gguf --out back")
    assert code == 0 and "SteeringVector" in said
    back, straight = ods.load_steerer("back"), ods.load_steerer("straight")
    torch.testing.assert_close(back.vector.norm(), .5 * straight.spread_)
    code, said = sh(capsys, "export bent --at prompts.jsonl --to lm-eval --out v.pt")
    assert code == 0 and "depends on the activation" in said and torch.load("v.pt", weights_only=True).keys() == {"layers.1"}
    export_vectors({1: straight, 2: straight}, "two.safetensors")
    assert sh(capsys, "import two.safetensors --out both")[0] == 0 and isinstance(ods.load_steerer("both/layer-2"), ods.SteeringVector)
    assert sh(capsys, "import two.safetensors --layer 2 --like straight --out one")[0] == 0 and ods.load_steerer("one").about["layer"] == 2


@pytest.mark.parametrize(("line", "said"), [
    ("export bent --out w.gguf", "give --at PROMPTS"), ("export straight --out w.txt", "give --to one of"), ("export straight --out w.gguf --to lm-eval", "must end in .pt"),
    ("export nowhere/at/all --out w.gguf", "no folder"), ("export straight --out no/w.gguf", "no folder no"), ("export straight --T 1 --spread 1 --out w.gguf", "give one strength"),
    ("export straight --layer 0 --out w.gguf", "block 0"), ("import v.pt --out w", "is a pickle"), ("import nothing.gguf --out w", "no file"), ("import two.safetensors --layer 7 --out w", "no vector for block 7"),
    ("push straight nope", "no name on the hub"), ("push nowhere/at/all me/x", "no folder")])
def test_mistakes_in_a_shell(line, said, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if "v.pt" in line: torch.save({}, "v.pt")
    if "two" in line: export_vectors({1: ods.load_steerer("straight"), 2: ods.load_steerer("straight")}, "two.safetensors")
    code, told = sh(capsys, line)
    assert code == 2 and said in told and told.count("\n") == 1 and not any(place.glob("w*"))


def test_push_in_a_shell_with_a_check(place, held, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, said = sh(capsys, "push straight me/truth --pairs val.jsonl --columns pos,neg --model model")
    commit = re.search("me/truth: commit ([0-9a-f]{40})", said)
    assert code == 0 and commit, said
    readme = held.repos["me/truth"]["commits"][commit[1]]["README.md"].decode()
    assert "held-out items" in readme and "random directions" in readme
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, said = sh(capsys, "push straight me/truth")
    assert code == 2 and "the hub does not let you write to me/truth" in said
