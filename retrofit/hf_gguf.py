"""A GGUF file of the llama family becomes a Hugging Face folder: config.json, model.safetensors, tokenizer.json.

MLX reads the file. Its 4- and 8-bit blocks are spread out to float16, as transformers does. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from pathlib import Path

import hf_backend  # noqa: F401  (before mlx)
import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tool import InputError, write_json

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3  # the token type of special pieces


class Metadata:
    """The key-value pairs of a GGUF file; a missing one is an InputError that names it."""

    def __init__(self, path: Path, values: dict):
        self.path = path
        self.values = values

    def get(self, key: str, default=None):
        """A Python number, string or list; an array stays an array."""
        value = self.values.get(key, default)
        return value.item() if isinstance(value, mx.array) and value.ndim == 0 else value

    def __getitem__(self, key: str):
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.path}: expected the GGUF key {key}, found none; take a file of the llama family")
        return value


def read(path: Path) -> tuple[dict, Metadata]:
    """Tensors, in MLX's quantized form where the file is quantized, and metadata. Raises InputError."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path}: expected a GGUF file, found one that begins with {magic!r}")
    try:
        weights, values = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: expected a whole GGUF file, found damage ({error}); download it again") from None
    meta = Metadata(path, values)
    if meta["general.architecture"] != "llama":
        found = meta["general.architecture"]
        raise InputError(f"{path}: expected a GGUF of the llama family, found {found}; give the Hugging Face folder")
    return weights, meta


def spread(weights: dict, name: str) -> mx.array:
    """A tensor as float16, out of its blocks if it is quantized: w = scale * q + bias, computed in float32."""
    weight, scales = weights[f"{name}.weight"], weights.get(f"{name}.scales")
    if scales is None:
        return weight.astype(mx.float16)
    group, biases = 32, weights[f"{name}.biases"].astype(mx.float32)  # the block of Q4_0, Q4_1 and Q8_0
    bits = 32 * weight.shape[-1] // (group * scales.shape[-1])
    return mx.dequantize(weight, scales.astype(mx.float32), biases, group, bits).astype(mx.float16)


def rows_of_halves(weight: mx.array, heads: int) -> mx.array:
    """llama.cpp keeps the two numbers of a rotary pair side by side, Hugging Face in two halves of the head."""
    shape = weight.shape
    return weight.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def convert_weights(weights: dict, meta: Metadata) -> dict:
    """The tensors under Hugging Face's names, float16."""
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    out = {}
    for key in weights:
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
        if (layer[2] not in LAYER) if layer else (name not in OUTSIDE):
            raise InputError(f"{meta.path}: expected the tensors of a llama, found {key}; give the Hugging Face folder")
        tensor = spread(weights, name)
        if layer and layer[2] in heads:
            tensor = rows_of_halves(tensor, heads[layer[2]])
        out[f"model.layers.{layer[1]}.{LAYER[layer[2]]}.weight" if layer else f"{OUTSIDE[name]}.weight"] = tensor
    return out


def convert_config(meta: Metadata, tied: bool) -> dict:
    heads, dim = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": dim // heads,
        "intermediate_size": meta["llama.feed_forward_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),  # it was a float32
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float16",
    }


def splitter(meta: Metadata) -> pre_tokenizers.PreTokenizer:
    """What cuts a text before the merges. SmolLM2 takes every digit by itself before GPT-2's rule."""
    kind = meta.get("tokenizer.ggml.pre", "gpt-2")
    bytes_of_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "gpt-2":
        return bytes_of_gpt2
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, bytes_of_gpt2])
    raise InputError(f"{meta.path}: expected a tokenizer of kind gpt-2 or smollm, found {kind}; give the HF folder")


def convert_tokenizer(meta: Metadata) -> tuple[Tokenizer, dict]:
    """The byte-level BPE tokenizer and the contents of tokenizer_config.json."""
    if meta["tokenizer.ggml.model"] != "gpt2":
        found = meta["tokenizer.ggml.model"]
        raise InputError(f"{meta.path}: expected a byte-level BPE tokenizer (gpt2), found {found}; give the HF folder")
    pieces, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = splitter(meta)
    tokenizer.decoder = decoders.ByteLevel()
    special = [piece for piece, kind in zip(pieces, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": pieces[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config


def convert(path: Path, folder: Path) -> None:
    """Writes a Hugging Face folder from a GGUF file. Raises InputError for what it cannot read."""
    weights, meta = read(path)
    tokenizer, tokenizer_config = convert_tokenizer(meta)
    tensors = convert_weights(weights, meta)
    config = convert_config(meta, tied="lm_head.weight" not in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "config.json", config)
