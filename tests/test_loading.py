"Models come from one place: evaluation mode, a device, a dtype, a tokenizer that can pad, errors in one line"
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import odesteer as ods
from odesteer.models import load_pretrained, no_progress_bars
from odesteer.pretrained import count_layers, load_model

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
    model, tokenizer = load_model(str(tiny), device="cpu")
    assert type(model) is transformers.LlamaForCausalLM and not any(m.training for m in model.modules())
    assert model.device.type == "cpu" and model.dtype == torch.bfloat16  # as saved
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert len(ods.generate_text(model, tokenizer, ["a b", "c"], max_new_tokens=3, do_sample=False)) == 2
    assert ods.load_model is load_model


def test_a_pad_token_of_its_own_is_kept(tiny, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="e")
    assert load_model(tmp_path)[1].pad_token == "e"


@pytest.mark.parametrize("dtype, expected", [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)])
def test_dtype_by_name(tiny, dtype, expected): assert load_model(str(tiny), dtype=dtype)[0].dtype == expected


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
    load_model(str(tiny), device="cpu")
    assert capfd.readouterr() == ("", "")
