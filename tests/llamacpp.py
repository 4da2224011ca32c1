"llama.cpp without its command line: a model of ours as its file, and logits under a control vector that it loads itself, by the library that xllamacpp brings"
import ctypes
from ctypes import POINTER, byref, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path

import torch


def write_model(model, path):
    "A Llama of transformers in float32 as a GGUF file without a vocabulary"
    import gguf
    c, w, state = model.config, gguf.GGUFWriter(path, "llama"), model.state_dict()
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_vocab_size(c.vocab_size)
    w.add_file_type(0)
    w.add_tokenizer_model("none")
    def turned(x, heads):  # llama.cpp turns neighbouring entries together, transformers those half a head apart
        return x.reshape(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    for t in range(c.num_hidden_layers): tensors |= {f"blk.{t}.{b}": state[f"model.layers.{t}.{a}.weight"] for a, b in names.items()}
    for name, x in tensors.items():
        if name.endswith("attn_q"): x = turned(x, c.num_attention_heads)
        if name.endswith("attn_k"): x = turned(x, c.num_key_value_heads)
        w.add_tensor(f"{name}.weight", x.float().contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


class _Params(ctypes.Structure):
    "Settings whose fields we leave as they are: larger than any version's, which is harmless as the last argument"
    _fields_ = [("bytes", c_char * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
                ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(ctypes.c_int8))]


class _Vector(ctypes.Structure):  # std::vector
    _fields_ = [("begin", c_void_p), ("end", c_void_p), ("room", c_void_p)]


class _String(ctypes.Structure):  # what stands before the letters of a std::string in the layout of manylinux2014, then these
    _fields_ = [("size", c_size_t), ("room", c_size_t), ("shared", c_size_t), ("text", c_char * 1000)]


class _LoadInfo(ctypes.Structure):  # common_control_vector_load_info
    _fields_ = [("strength", c_float), ("name", c_void_p)]


class _Loaded(ctypes.Structure):  # common_control_vector_data
    _fields_ = [("n_embd", c_int), ("data", _Vector)]


def library():
    import xllamacpp
    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Params
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = c_void_p
    lib.llama_model_load_from_file.argtypes, lib.llama_init_from_model.argtypes = [c_char_p, _Params], [c_void_p, _Params]
    lib.llama_decode.argtypes, lib.llama_decode.restype = [c_void_p, _Batch], c_int32
    lib.llama_get_logits_ith.argtypes, lib.llama_get_logits_ith.restype = [c_void_p, c_int32], POINTER(c_float)
    lib.llama_set_adapter_cvec.argtypes, lib.llama_set_adapter_cvec.restype = [c_void_p, c_void_p, c_size_t, c_int32, c_int32, c_int32], c_int32
    lib.llama_get_memory.argtypes, lib.llama_get_memory.restype = [c_void_p], c_void_p
    lib.llama_memory_clear.argtypes = [c_void_p, c_bool]
    return lib


def load_control_vector(lib, file) -> tuple:  # width, address of the numbers, how many
    "What llama.cpp's own reader makes of a file; a ValueError where it refuses it"
    path = str(file).encode()
    name = _String(len(path), len(path), 99, path)
    info = _LoadInfo(1., ctypes.addressof(name) + 24)
    at = ctypes.addressof(info)
    infos, found = _Vector(at, at + ctypes.sizeof(info), at + ctypes.sizeof(info)), _Loaded()
    load = lib._Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE
    load.argtypes, load.restype = [c_void_p, c_void_p], c_void_p
    load(byref(found), byref(infos))
    if found.n_embd < 1: raise ValueError(f"llama.cpp reads no control vector from {file}")
    return found.n_embd, found.data.begin, (found.data.end - found.data.begin) // 4


class Llama:
    "A model in llama.cpp, under a control vector from a file if there is one"
    def __init__(self, model, path, file=None):
        write_model(model, path)
        self.lib, self.words = library(), model.config.vocab_size
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        self.context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        if file is not None:
            width, data, n = load_control_vector(self.lib, file)
            last = model.config.num_hidden_layers
            assert self.lib.llama_set_adapter_cvec(self.context, data, n, width, 1, last) == 0

    def logits(self, ids):
        "Logits of all tokens, (n, words), read one after the other"
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        out = []
        for i, word in enumerate(ids):
            token, pos, one, seq = (c_int32 * 1)(word), (c_int32 * 1)(i), (c_int32 * 1)(1), (c_int32 * 1)(0)
            batch = _Batch(1, token, None, pos, one, (POINTER(c_int32) * 1)(seq), (ctypes.c_int8 * 1)(1))
            assert self.lib.llama_decode(self.context, batch) == 0
            found = self.lib.llama_get_logits_ith(self.context, 0)
            out.append(torch.tensor(found[:self.words]))
        return torch.stack(out)
