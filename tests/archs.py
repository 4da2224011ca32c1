"""25 causal language models with random weights, a few thousand parameters each: one tiny configuration per architecture."""
import torch

VOCAB, WIDTH, LAYERS = 64, 32, 4

_llama = dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_heads = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_moe = dict(_llama, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

#: architecture -> (class prefix, what its configuration is given)
CONFIGS = {
    "llama": ("Llama", _llama),
    "mistral": ("Mistral", dict(_llama, sliding_window=None)),
    "qwen2": ("Qwen2", _llama),
    "qwen3": ("Qwen3", dict(_llama, head_dim=8)),
    "gemma": ("Gemma", dict(_llama, head_dim=8)),
    "gemma2": ("Gemma2", dict(_llama, head_dim=8, sliding_window=16)),
    "gemma3_text": ("Gemma3", dict(_llama, head_dim=8, sliding_window=16)),
    "falcon": ("Falcon", dict(_heads, alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True)),
    "gpt_neox": ("GPTNeoX", dict(_heads, intermediate_size=48, max_position_embeddings=128)),
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "phi": ("Phi", dict(_llama, num_key_value_heads=4)),
    "phi3": ("Phi3", dict(_llama, num_key_value_heads=4)),
    "opt": ("OPT", dict(_heads, ffn_dim=48, word_embed_proj_dim=WIDTH, max_position_embeddings=128)),
    "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "mixtral": ("Mixtral", dict(_llama, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2_moe": ("Qwen2Moe", dict(_moe, shared_expert_intermediate_size=24)),
    "qwen3_moe": ("Qwen3Moe", dict(_moe, head_dim=8)),
    "olmo2": ("Olmo2", _llama),
    "stablelm": ("StableLm", _llama),
    "mamba": ("Mamba", dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8, intermediate_size=64, time_step_rank=4,
                            pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "gpt_oss": ("GptOss", dict(_llama, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)),
    "deepseek_v3": ("DeepseekV3", dict(_llama, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
                                       n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                                       qk_nope_head_dim=8, v_head_dim=8)),
    "granite": ("Granite", _llama),
    "cohere": ("Cohere", _llama),
    "starcoder2": ("Starcoder2", dict(_llama, sliding_window=None)),
}


def tiny_model(arch, seed=0, **changes):
    "A random model of this architecture in evaluation mode; the global random state is left as it was"
    import transformers
    prefix, settings = CONFIGS[arch]
    config_class = getattr(transformers, prefix + ("TextConfig" if arch == "gemma3_text" else "Config"))
    model_class = getattr(transformers, prefix + ("LMHeadModel" if arch == "gpt2" else "ForCausalLM"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**settings, **changes})).eval()
        for p in model.parameters():  # the usual start of .02 gives logits so flat that no edit could change a token
            if p.ndim > 1: torch.nn.init.normal_(p, std=.2)
    model.generation_config.eos_token_id = VOCAB  # no token has this id: every answer has the length asked for
    return model


def untouched(a, b, model) -> bool:
    "Equal bit for bit; up to rounding where tokens share experts, since with several threads a sum depends on who else is in the group"
    shared = getattr(model.config.get_text_config(), "_experts_implementation", "eager") == "grouped_mm"
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5) if shared else torch.equal(a, b)


def tiny_tokenizer(bos=True):
    "One token per character: <pad> <s> </s> <unk>, then what can be typed; a chat template with a beginning-of-sequence token"
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {c: i for i, c in enumerate(special + list("abcdefghijklmnopqrstuvwxyz 0123456789.,:?!'-\n|QAU"))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tok.add_special_tokens(special)
    if bos: tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   model_input_names=["input_ids", "attention_mask"])
    fast.chat_template = ("{{ bos_token }}{% for m in messages %}|{{ m['role'][0] }}:{{ m['content'] }}</s>\n{% endfor %}"
                          "{% if add_generation_prompt %}|a:{% endif %}")
    return fast
