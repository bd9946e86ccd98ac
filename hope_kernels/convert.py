"""Pre-trained models as HOPE: ``hope_kernels.convert.llama(model, chunks)`` makes HOPE-Attention of a Llama,
Mistral, Qwen2, Qwen3 or Gemma 3.

A decoder block of these models is attention and a gated MLP, each on a normed residual: what a
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

# Other types share the names of modules and parameters, and compute something else (scaled residuals, shared
# norms, ...).
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_OUTER = {
    "model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"
}
_LINEARS = {**{f"self_attn.{n}_proj": f"mixer.{n}_proj" for n in "qkvo"},
            **{f"mlp.{n}_proj": f"cms.levels.0.{n}" for n in ("gate", "up", "down")}}
_NORMS = {"input_layernorm": "norm.weight", "post_attention_layernorm": "cms.levels.0.norm_gain"}
_HEAD_NORMS = {f"self_attn.{n}_norm": f"mixer.{n}_norm.weight" for n in "qk"}
_NORMS_OF = {  # the types that have others
    "qwen3": _NORMS | _HEAD_NORMS,
    "gemma3_text": _HEAD_NORMS | {
        "input_layernorm": "norm.weight", "post_attention_layernorm": "post_norm.weight",
        "pre_feedforward_layernorm": "cms.levels.0.norm_gain",
        "post_feedforward_layernorm": "cms.levels.0.post_gain",
    },
}
# what the original decides about the levels
_FIXED = ("d_model", "chunks", "variant", "expansion", "mlp", "bias", "intermediate_size", "norm", "post_norm")


def llama(
    hf_model: nn.Module, chunks: int | Sequence[int], lr: float | Sequence[float] | None = None,
    optimizer: str | None = None, learn_blocks: Sequence[int] | None = None, *, window: int | None = None,
    sinks: int = 0, **cms_options: Any,
) -> HopeForCausalLM:
    """HOPE-Attention with the weights of ``hf_model``; its own MLPs are the initial states of the CMS.

    hf_model: a causal language model of transformers, of model_type llama, mistral, qwen2, qwen3 or
    gemma3_text. Grouped heads, heads of any width, biases of q, k, v and of the MLP, norms of queries and
    keys, tied embeddings, sliding windows in all layers or some, and RoPE of type default, linear or llama3
    are carried over.
    chunks: K periods in tokens, each a multiple of the smallest, K <= number of layers L: block b is one
    level with period chunks[b * K // L], so the first blocks get the first period. lr: None (the default of
    CMSConfig at that period), one for all, or one per period; 0 freezes its blocks. optimizer and
    cms_options: as in CMSConfig, but for what the original decides (sizes, gate, norms).
    learn_blocks: indices of the blocks that learn, -1 the last; None: all. The others cost a session nothing,
    and below the first of them nothing is computed for learning.
    window: tokens that a token sees, in place of the original's window; None: the original's. Where only some
    layers have a window of their own, those keep it if it is smaller. sinks: the first tokens stay visible
    beside the window, in the layers that ``window`` is for; docs/llama.md says what that is worth.

    Without learning, or with every lr 0, the logits are the original's: bit for bit in fp32 on the CPU where
    both read all tokens in one call without a window (attn_implementation="sdpa"), else to rounding: other
    splits and devices round otherwise, and outside fp32 the original's norms (in fp32) and, in bf16 and fp16,
    its rotations round more coarsely, and ours a Gemma's norms, whose 1 + weight becomes the gain. RoPE's
    frequencies are computed from the configuration, and the angles, as in the original, in fp32.

    Returns a new model in eval mode, of the dtype and on the device of ``hf_model``, and with copies of its
    weights (so the memory of two models while both are held; the original is never changed). While it learns,
    each sequence has its own MLPs in all blocks with lr > 0, and as much again for their gradients, both in
    fp32 (fp64 for fp64).
    Raises ValueError, naming the field, for what HOPE-Attention cannot express and for arguments out of
    range.
    Source: Nested Learning section 7.3.
    """
    config: Any = getattr(hf_model, "config", None)
    kind = getattr(config, "model_type", None)
    _require(kind in MODEL_TYPES, "config.model_type", kind, "one of " + ", ".join(map(repr, MODEL_TYPES)))
    gemma = kind == "gemma3_text"
    tensors = _tensors(hf_model, _NORMS_OF.get(str(kind), _NORMS))
    embed = tensors["embed.weight"]
    d, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    activation = "hidden_activation" if gemma else "hidden_act"
    known = {"gelu_pytorch_tanh": "geglu"} if gemma else {"silu": "swiglu", "swish": "swiglu"}
    mlp = known.get(getattr(config, activation))
    _require(mlp is not None, f"config.{activation}", getattr(config, activation), repr(next(iter(known))))
    theta, scaling = _rope(config, gemma)
    levels: dict[str, Any] = {
        "mlp": mlp, "bias": "blocks.0.cms.levels.0.up_bias" in tensors, "post_norm": gemma,
        "intermediate_size": config.intermediate_size, "optimizer": optimizer,
    }
    windows, kept = _windows(config, window, sinks)
    ours = HopeConfig(
        vocab_size=embed.shape[0], d_model=d, num_layers=layers, mixer="attention", num_heads=heads,
        num_kv_heads=config.num_key_value_heads, window=windows, sinks=kept, rope_theta=theta,
        rope_scaling=scaling, rope_dtype="float32", attention_bias="blocks.0.mixer.q_proj.bias" in tensors,
        norm_eps=config.rms_norm_eps, tie_embeddings="head.weight" not in tensors,
        head_dim=None if heads * head_dim == d else head_dim, qk_norm="blocks.0.mixer.q_norm.weight" in tensors,
        cms=_levels(d, layers, chunks, lr, levels, cms_options),
        learn_blocks=None if learn_blocks is None else tuple(learn_blocks),
        **(_gemma(config) if gemma else {}),
    )
    model = HopeForCausalLM(ours, device="meta", dtype=embed.dtype)
    with torch.inference_mode(False):
        copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        for name, t in copies.items() if gemma else ():
            if re.search(r"(norm\.weight|_gain)$", name):
                t.add_(1.0)
        try:
            model.load_state_dict(copies, assign=True)
        except RuntimeError as error:
            raise ValueError(f"convert.llama: the weights of hf_model do not fit its config ({error})") from None
    return model.eval()


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"convert.llama: {field} is {value!r}, expected {expected}")


def _gemma(config: Any) -> dict[str, Any]:
    """What HopeConfig has of Gemma 3 alone."""
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, field, None)
        _require(value is None, f"config.{field}", value, "None")
    both = getattr(config, "use_bidirectional_attention", None)
    _require(not both, "config.use_bidirectional_attention", both, "False")
    scales = {"embed_scale": config.hidden_size**0.5, "attention_scale": config.query_pre_attn_scalar**-0.5}
    return {"post_norm": True, **scales}


def _name(theirs: str, norms: dict[str, str]) -> str | None:
    """Our name of a parameter, None if it has no counterpart. norms: of a block, by their names."""
    if theirs in _OUTER:
        return _OUTER[theirs]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", theirs)
    if found is None:
        return None
    block, module, kind = found.groups()
    if kind == "weight" and module in norms:
        return f"blocks.{block}.{norms[module]}"
    if module not in _LINEARS or (module, kind) == ("self_attn.o_proj", "bias"):
        return None
    ours = f"blocks.{block}.{_LINEARS[module]}"
    if module.startswith("mlp."):
        return ours if kind == "weight" else f"{ours}_bias"
    return f"{ours}.{kind}"


def _tensors(hf_model: nn.Module, norms: dict[str, str]) -> dict[str, torch.Tensor]:
    """The parameters under our names. A tied head is one parameter with the embedding, and so not among them."""
    tensors = {}
    for theirs, p in hf_model.named_parameters():
        ours = _name(theirs, norms)
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


def _rope(config: Any, gemma: bool) -> tuple[Any, Any]:
    """(theta, scaling) of a configuration: one value each, or one per layer."""
    given: Any = getattr(config, "rope_parameters", None)
    if not gemma:
        return _rope_of("config.rope_parameters", given)
    kinds, found = config.layer_types, {}
    for kind in set(kinds):
        of_kind = given.get(kind) if isinstance(given, dict) else None
        found[kind] = _rope_of(f"config.rope_parameters[{kind!r}]", of_kind)
    theta, scaling = zip(*(found[kind] for kind in kinds))
    return _one(theta), _one(scaling)


def _rope_of(field: str, given: Any) -> tuple[float, RopeScaling | None]:
    known = isinstance(given, dict) and "rope_theta" in given
    _require(known, field, given, "a dict with rope_theta, as of transformers 5")
    numbers: dict[str, Any] = dict(given)
    theta, kind = numbers.pop("rope_theta"), numbers.get("rope_type", "default")
    partial = numbers.pop("partial_rotary_factor", 1.0)
    types = ("default", "linear", "llama3")
    _require(kind in types, f"{field}['rope_type']", kind, "'default', 'linear' or 'llama3'")
    _require(partial == 1, f"{field}['partial_rotary_factor']", partial, "1.0")
    if kind == "default":
        return theta, None
    # a linear type may carry other types' numbers, which it does not read
    read = ("rope_type", "factor") if kind == "linear" else tuple(f.name for f in fields(RopeScaling))
    scaling: dict[str, Any] = {name: numbers.get(name) for name in read}
    return theta, RopeScaling(**scaling)


def _windows(config: Any, window: int | None, sinks: int) -> tuple[Any, Any]:
    """(window, sinks) for HopeConfig: the original's, or with ``window`` in place of the original's."""
    own = getattr(config, "sliding_window", None)
    default = "full_attention" if own is None else "sliding_attention"
    kinds = list(getattr(config, "layer_types", None) or [default] * config.num_hidden_layers)
    _require(
        set(kinds) <= {"full_attention", "sliding_attention"}, "config.layer_types", sorted(set(kinds)),
        "'full_attention' and 'sliding_attention'"
    )
    windows = [own if kind == "sliding_attention" else None for kind in kinds]
    ok = window is None or isinstance(window, int) and not isinstance(window, bool) and window > 0
    _require(ok, "argument window", window, "None or a positive integer")
    ok = isinstance(sinks, int) and not isinstance(sinks, bool) and sinks >= 0
    _require(ok, "argument sinks", sinks, "an integer >= 0")
    mixed = len(set(windows)) > 1
    changed = [own is None or not mixed or (window is not None and window < own) for own in windows]
    if window is not None:
        windows = [window if new else own for own, new in zip(windows, changed)]
    _require(
        sinks == 0 or all(w is not None for w in windows), "argument sinks", sinks,
        "0 without a window: every token is visible"
    )
    return _one(windows), _one([sinks if new else 0 for new in changed])


def _one(values: Sequence[Any]) -> Any:
    """The value that all have, or the tuple of them."""
    return values[0] if all(v == values[0] for v in values) else tuple(values)


def _levels(
    d: int, layers: int, chunks: Any, lr: Any, own: dict[str, Any], options: dict[str, Any]
) -> tuple[CMSConfig, ...]:
    """The CMS of every block. own: what the original decides, and the optimizer; options: the caller's."""
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
    free = [f.name for f in fields(CMSConfig) if f.name not in _FIXED]
    for name, value in options.items():
        _require(name in free, f"argument {name}", value, "no such argument: of CMSConfig's, " + ", ".join(free))
    kinds = [CMSConfig(d_model=d, chunks=(c,), lr=r, **own, **options) for c, r in zip(chunks, rates)]
    return tuple(kinds[b * K // layers] for b in range(layers))
