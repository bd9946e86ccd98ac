"""backend="cuda": csrc/cuda/, C++ kernels that keep a head's fast weights in the registers of a
multiprocessor. Inference only.

``hope_kernels_cuda::titans_scan`` advances a state in place, all but its counter, and
``hope_kernels_cuda::titans_advance`` the counter too; ``titans_cuda`` gives the first copies of what it will
write. Outputs and states are bit-identical for any split of a sequence and any company in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import TitansConfig
from ..shared import cuda_library as library
from ..shared.activations import ACTIVATION_CODES
from .kernel_call import call
from .rounded import RoundedWeights
from .state import FastWeights, TitansState

DTYPES = (torch.bfloat16, torch.float16)
# (head width, hidden_mult); csrc/cuda has the other half of this table
SHAPES = ((64, 1), (64, 2), (64, 4), (128, 1), (128, 2))
CHUNKS = (16, 32, 64)
_WRITTEN = ("delta2", "delta1", "delta1s", "pending_k", "pending_v", "pending_eta", "pending_alpha")
# csrc/cuda/params.h has the same numbers
_UNIT_K, _SOFTPLUS, _OWN_VALUES, _TARGET_NORM, _DOT, _DGD, _CLIP, _RETENTION, _UPDATE, _FLOAT_BIAS = (
    1 << i for i in range(10)
)


def unserved(config: TitansConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend cannot serve a layer, or None."""
    if dtype not in DTYPES:
        return f"serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    if config.memory != "mlp":
        return f'serves memory="mlp", not memory="{config.memory}"'
    if not config.self_modifying:
        return "serves self-modifying memories, not self_modifying=False"
    for name in ("momentum", "adaptive_q", "scalar_skip"):
        if getattr(config, name):
            return f"serves layers without {name}, not {name}={getattr(config, name)!r}"
    if (config.head_dim, config.hidden_mult) not in SHAPES:
        return f"serves (head width, hidden_mult) of {SHAPES}, not {config.head_dim, config.hidden_mult}"
    if config.chunk_memory != config.chunk_other or config.chunk_memory not in CHUNKS:
        return f"serves chunk_memory = chunk_other in {CHUNKS}, not {config.chunk_memory} and {config.chunk_other}"
    if device.type != ("cpu" if library.emulated() else "cuda"):
        return f"needs a CUDA device, not {device.type}"
    return library.unavailable() or library.unserved(config.head_dim, config.hidden, config.chunk_memory, device)


def titans_cuda(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool = False, stats=None,
) -> tuple[Tensor, TitansState]:
    """As ``scan.titans_chunk``, without a graph; ``constant_memory`` changes nothing there. Raises
    ValueError for ``stats``, and for arguments that require a gradient where gradients are on."""
    if stats is not None:
        raise ValueError("titans: backend 'cuda' collects no statistics; the chunked backend does")
    tensors = (*w_init, *inputs, *(getattr(state, n) for n in _WRITTEN))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("titans: backend 'cuda' serves inference, under torch.no_grad(); backend='triton' trains")
    return call(_scan, _WRITTEN, config.chunk_memory, config, w_init, inputs, state, lengths, update)


def titans_advance_(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: Tensor, *, update: bool = True,
    rounded: RoundedWeights | None = None,
) -> Tensor:
    """As ``titans_cuda``, in place and without a look from the host: o. ``state.synchronize()`` brings
    ``state.pos`` after it."""
    copy = None if rounded is None else rounded.of(config, w_init, state)
    given = arguments(config, w_init, inputs, state, state.count, lengths, update, copy)
    return torch.ops.hope_kernels_cuda.titans_advance(*given)


def _scan(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, pos: Tensor, lengths: Tensor,
    update: bool
) -> Tensor:
    copy = None if state._rounded is None else state._rounded.of(config, w_init, state)
    given = arguments(config, w_init, inputs, state, pos, lengths, update, copy)
    return torch.ops.hope_kernels_cuda.titans_scan(*given)


def arguments(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, pos: Tensor, lengths: Tensor,
    update: bool, rounded: Tensor | None = None,
) -> tuple:
    """What ``hope_kernels_cuda::titans_scan`` takes, in order. rounded: of a ``RoundedWeights``."""
    dtype = inputs.x.dtype
    base = [t.to(dtype) for t in w_init] if config.retain_to == "init" else [None] * 3
    biases = [inputs.eta_bias, inputs.alpha_bias if config.retention else None]
    same = all(t is None or t.dtype == dtype for t in biases)
    biases = [t if t is None or same else t.float() for t in biases]
    return (
        inputs.x, inputs.q, *base, *(getattr(state, n) for n in _WRITTEN), *biases, pos, lengths, rounded,
        ACTIVATION_CODES[config.activation], flags(config, update, not same), config.eta_scale,
        1.0 if config.objective == "dot" else config.grad_scale,
    )


def flags(config: TitansConfig, update: bool, float_bias: bool) -> int:
    """``TitansParams::flags`` of csrc/cuda/params.h."""
    bits = {
        _UNIT_K: config.qk_l2norm, _SOFTPLUS: config.eta_activation == "softplus", _OWN_VALUES: config.own_values,
        _TARGET_NORM: config.target_norm, _DOT: config.objective == "dot", _DGD: config.dgd,
        _CLIP: config.step_clip, _RETENTION: config.retention, _UPDATE: update, _FLOAT_BIAS: float_bias,
    }
    return sum(bit for bit, on in bits.items() if on)
