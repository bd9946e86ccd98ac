"""Pre-trained models as HOPE: ``hope_kernels.convert.llama(model, chunks)`` makes HOPE-Attention of a Llama,
Mistral or Qwen2.

A decoder block of these models is attention and a SwiGLU MLP, each on a normed residual: what a
HOPE-Attention block with one CMS level is. So every MLP becomes the initial state of a level, and learns at a
period of its own while the model reads (Nested Learning section 7.3, ad hoc level stacking). Works on the
model object; nothing here imports the library that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from .config import CMSConfig, HopeConfig, RopeScaling
from .model import HopeForCausalLM

# Other types share the names of modules and parameters, and compute something else (scaled residuals, norms
# of 1 + weight, ...).
MODEL_TYPES = ("llama", "mistral", "qwen2")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_OUTER = {
    "model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"
}
_LINEARS = {**{f"self_attn.{n}_proj": f"mixer.{n}_proj" for n in "qkvo"},
            **{f"mlp.{n}_proj": f"cms.levels.0.{n}" for n in ("gate", "up", "down")}}


def llama(
    hf_model: nn.Module, chunks: int | Sequence[int], lr: float | Sequence[float] | None = None,
    optimizer: str = "gd", learn_blocks: Sequence[int] | None = None
) -> HopeForCausalLM:
    """HOPE-Attention with the weights of ``hf_model``; its own MLPs are the initial states of the CMS.

    hf_model: a causal language model of transformers, of model_type llama, mistral or qwen2. Grouped heads,
    biases of q, k, v and of the MLP, tied embeddings, a sliding window in all layers, and RoPE of type
    default, linear or llama3 are carried over.
    chunks: K periods in tokens, each a multiple of the smallest, K <= number of layers L: block b is one
    level with period chunks[b * K // L], so the first blocks get the first period. lr: None (the default of
    CMSConfig at that period), one for all, or one per period; 0 freezes its blocks. optimizer: as in CMSConfig.
    learn_blocks: indices of the blocks that learn, -1 the last; None: all. The others cost a session nothing,
    and below the first of them nothing is computed for learning.

    Without learning, or with every lr 0, the logits are the original's: bit for bit in fp32 on the CPU where
    both read all tokens in one call without a window (attn_implementation="sdpa"), else to rounding: other
    splits and devices round otherwise, and outside fp32 the original's norms (in fp32) and, in bf16 and fp16,
    its rotations round more coarsely. RoPE's frequencies are computed from the configuration, and the angles,
    as in the original, in fp32.

    Returns a new model in eval mode, of the dtype and on the device of ``hf_model``, and with copies of its
    weights (so the memory of two models while both are held; the original is never changed). While it learns,
    each sequence has its own MLPs in all blocks with lr > 0, and as much again for their gradients, both in
    fp32 (fp64 for fp64).
    Raises ValueError, naming the field, for what HOPE-Attention cannot express and for chunks and lr out of
    range.
    Source: Nested Learning section 7.3.
    """
    config: Any = getattr(hf_model, "config", None)
    kind = getattr(config, "model_type", None)
    _require(kind in MODEL_TYPES, "config.model_type", kind, "one of " + ", ".join(map(repr, MODEL_TYPES)))
    tensors = _tensors(hf_model)
    embed = tensors["embed.weight"]
    d, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    _require(
        heads * head_dim == d, "config.head_dim", head_dim, f"hidden_size / num_attention_heads = {d / heads:g}"
    )
    _require(config.hidden_act in ("silu", "swish"), "config.hidden_act", config.hidden_act, "'silu'")
    theta, scaling = _rope(config)
    ours = HopeConfig(
        vocab_size=embed.shape[0], d_model=d, num_layers=layers, mixer="attention", num_heads=heads,
        num_kv_heads=config.num_key_value_heads, window=_window(config), rope_theta=theta,
        rope_scaling=scaling, rope_dtype="float32", attention_bias="blocks.0.mixer.q_proj.bias" in tensors,
        norm_eps=config.rms_norm_eps, tie_embeddings="head.weight" not in tensors,
        cms=_levels(
            d, layers, config.intermediate_size, "blocks.0.cms.levels.0.up_bias" in tensors, chunks, lr, optimizer
        ),
        learn_blocks=None if learn_blocks is None else tuple(learn_blocks),
    )
    model = HopeForCausalLM(ours, device="meta", dtype=embed.dtype)
    with torch.inference_mode(False):
        copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        try:
            model.load_state_dict(copies, assign=True)
        except RuntimeError as error:
            raise ValueError(f"convert.llama: the weights of hf_model do not fit its config ({error})") from None
    return model.eval()


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"convert.llama: {field} is {value!r}, expected {expected}")


def _name(theirs: str) -> str | None:
    """Our name of a parameter, None if it has no counterpart."""
    if theirs in _OUTER:
        return _OUTER[theirs]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", theirs)
    if found is None:
        return None
    block, module, kind = found.groups()
    if kind == "weight" and module in ("input_layernorm", "post_attention_layernorm"):
        return f"blocks.{block}." + ("norm.weight" if module == "input_layernorm" else "cms.levels.0.norm_gain")
    if module not in _LINEARS or (module, kind) == ("self_attn.o_proj", "bias"):
        return None
    ours = f"blocks.{block}.{_LINEARS[module]}"
    if module.startswith("mlp."):
        return ours if kind == "weight" else f"{ours}_bias"
    return f"{ours}.{kind}"


def _tensors(hf_model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters under our names. A tied head is one parameter with the embedding, and so not among them."""
    tensors = {}
    for theirs, p in hf_model.named_parameters():
        ours = _name(theirs)
        if ours is None:
            raise ValueError(f"convert.llama: parameter {theirs} of hf_model has no place in HOPE-Attention, expected "
                             "a causal language model of embedding, projections q, k, v, o (without bias), gate, "
                             "up, down, RMSNorms and head")
        _require(p.dtype in DTYPES, f"dtype of {theirs}", p.dtype, "one of " + ", ".join(map(str, DTYPES)))
        _require(
            type(p) is nn.Parameter, f"type of {theirs}", type(p).__name__,
            "Parameter: dequantize, gather or merge the weights first"
        )
        _require(p.device.type != "meta", f"device of {theirs}", str(p.device), "one that holds data")
        tensors[ours] = p
    _require(
        "embed.weight" in tensors, "hf_model", type(hf_model).__name__, "a causal language model with an embedding"
    )
    for what in ("dtype", "device"):
        kinds = sorted({str(getattr(p, what)) for p in tensors.values()})
        _require(len(kinds) == 1, f"{what} of hf_model", kinds, "the same for all parameters")
    return tensors


def _rope(config: Any) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a configuration."""
    given: Any = getattr(config, "rope_parameters", None)
    known = isinstance(given, dict) and "rope_theta" in given
    _require(known, "config.rope_parameters", given, "a dict with rope_theta, as of transformers 5")
    numbers: dict[str, Any] = dict(given)
    theta, kind = numbers.pop("rope_theta"), numbers.get("rope_type", "default")
    partial = numbers.pop("partial_rotary_factor", 1.0)
    _require(
        kind in ("default", "linear", "llama3"), "config.rope_parameters['rope_type']", kind,
        "'default', 'linear' or 'llama3'"
    )
    _require(partial == 1, "config.rope_parameters['partial_rotary_factor']", partial, "1.0")
    if kind == "default":
        return theta, None
    # a linear type may carry other types' numbers, which it does not read
    read = ("rope_type", "factor") if kind == "linear" else tuple(f.name for f in fields(RopeScaling))
    scaling: dict[str, Any] = {name: numbers.get(name) for name in read}
    return theta, RopeScaling(**scaling)


def _window(config: Any) -> int | None:
    """The sliding window of all layers, None where all see everything."""
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = set(getattr(config, "layer_types", None) or [default])
    _require(
        len(kinds) == 1 and kinds <= {"full_attention", "sliding_attention"}, "config.layer_types", sorted(kinds),
        "'full_attention' in all layers or 'sliding_attention' in all"
    )
    return window if kinds == {"sliding_attention"} else None


def _levels(
    d: int, layers: int, hidden: int, bias: bool, chunks: Any, lr: Any, optimizer: str
) -> tuple[CMSConfig, ...]:
    """The CMS of every block."""
    chunks = tuple(chunks) if isinstance(chunks, (list, tuple)) else (chunks,)
    K = len(chunks)
    _require(0 < K <= layers, "argument chunks", chunks, f"1 to {layers} periods (one per layer at most)")
    _require(
        all(isinstance(c, int) and not isinstance(c, bool) and c > 0 for c in chunks), "argument chunks",
        chunks, "positive integers"
    )
    _require(
        all(c % min(chunks) == 0 for c in chunks), "argument chunks", chunks,
        f"multiples of the smallest, {min(chunks)}"
    )
    rates = tuple(lr) if isinstance(lr, (list, tuple)) else (lr,) * K
    _require(len(rates) == K, "argument lr", lr, f"None, a number, or one per period ({K})")
    kinds = [
        CMSConfig(d, c, mlp="swiglu", bias=bias, intermediate_size=hidden, lr=r, optimizer=optimizer)
        for c, r in zip(chunks, rates)
    ]
    return tuple(kinds[b * K // layers] for b in range(layers))
