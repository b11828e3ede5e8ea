"""Hugging Face folders for tests: a random small Llama, and stories260K, a real model in llama2.c's layout."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor

from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "checkpoints" / "stories260K"
STORIES_TEXT = (  # llama2.c's own test: run stories260K.bin -z tok512.bin -t 0.0 -n 200
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\""
)
BOS, EOS = 1, 2

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "initializer_range": 0.3,
}


def random_llama(
    folder: Path, *, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """Return a random `transformers` Llama saved in `folder`.

    Gains and biases are random too: ones and zeros would hide mistakes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5)
    model.type(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    # read back, because .to(bf16) also rounds the rotary table, which no checkpoint holds
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; a value None removes the key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write_stories260k(folder: Path) -> None:
    """Write stories260K as a Hugging Face folder: tied head, RoPE pairs (2i, 2i + 1) moved to (i, i + K / 2)."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = (STORIES / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("7i", raw[:28])
    values = torch.from_numpy(np.frombuffer(raw, dtype=np.float32, offset=28).copy())

    def take(*shape: int) -> Tensor:
        nonlocal values
        count = int(np.prod(shape))
        taken, values = values[:count].view(shape), values[count:]
        return taken

    kv_dim = dim // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for name, shape in shapes.items():
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                rows = weight.view(-1, dim // heads // 2, 2, dim)  # (heads, pair, member of the pair, D)
                weight = rows.transpose(1, 2).reshape(shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.contiguous()
    tensors["model.norm.weight"] = take(dim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _tok512().save(str(folder / "tokenizer.json"))


def _tok512() -> Tokenizer:
    """Return llama2.c's tokenizer: pieces in merge order, with byte fallback."""
    raw = (STORIES / "tok512.bin").read_bytes()[4:]
    pieces = []
    while raw:
        (length,) = struct.unpack("i", raw[4:8])
        pieces.append(raw[8 : 8 + length].decode().strip("\n").replace(" ", "\u2581"))
        raw = raw[8 + length :]
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == 512
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer
