"""backend="triton": the dispatcher operator around the memory's kernel, and the calls that go through it.

``hope_kernels::titans_scan`` advances a state in place; ``titans_triton`` gives it copies of what it will
write. Outputs and states are bit-identical for any split of a sequence and any company in the batch.
Gradients: ``training.py``.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ....config import TitansConfig
from ...shared.triton_build import DTYPES, aligned, filled
from ...shared.triton_library import architecture, interpreted, multiprocessors, on_cpu
from ..kernel_call import call
from ..state import FastWeights, TitansState
from . import carried
from .groups import Biases, Momentum, Progress, Reads, Scratch, Weights, Writes
from .schedule import scan_kernel
from .spans import CARRIED
from .tiles import CHUNKS, MULTIPLES, ROUNDED, WIDTHS, clocks, constants, counters, options, scratch_shapes

# What of a configuration the operator is told; widths, momentum (s2) and adaptive_q (no q) follow from the tensors.
_SETTINGS = {
    "chunk_memory": "int", "chunk_other": "int", "activation": "str", "self_modifying": "bool",
    "own_values": "bool", "target_norm": "bool",
    "step_clip": "bool", "objective": "str", "grad_scale": "float", "dgd": "bool", "retention": "bool",
    "retain_to": "str",
    "qk_l2norm": "bool", "eta_activation": "str", "eta_scale": "float", "scalar_skip": "bool",
}


def unserved(config: TitansConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the backend cannot serve a layer, or None."""
    if dtype not in DTYPES:
        return f"serves {', '.join(str(d) for d in DTYPES)}, not {dtype}"
    if config.memory != "mlp":
        return f'serves memory="mlp", not memory="{config.memory}"'
    if config.head_dim not in WIDTHS or config.hidden_mult not in MULTIPLES:
        return (
            f"serves head widths {WIDTHS} and hidden_mult {MULTIPLES}, "
            f"not {config.head_dim} and {config.hidden_mult}"
        )
    if not {config.chunk_memory, config.chunk_other} <= set(CHUNKS):
        return f"serves chunks of {CHUNKS} tokens, not {config.chunk_memory} and {config.chunk_other}"
    if device.type != "cuda" and not on_cpu():
        return f"needs a CUDA device, not {device.type}"
    return None


def titans_triton(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool = False, stats=None, reads: Tensor | None = None,
) -> tuple[Tensor, TitansState]:
    """As ``scan.titans_chunk``, under no_grad; ``constant_memory`` changes nothing there. Raises
    ValueError for ``stats``.

    reads [B] int64: ``lengths`` on the device, where they are there already.
    """
    if stats is not None:
        raise ValueError("titans: backend 'triton' collects no statistics; the chunked backend does")
    return call(_scan, CARRIED, clocks(config)[0].C, config, w_init, inputs, state, lengths, update, reads)


def titans_advance_(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, lengths: Tensor, *, update: bool = True
) -> Tensor:
    """As ``titans_triton``, in place and without a look from the host: o. ``state.synchronize()`` brings
    ``state.pos`` after it."""
    lengths = lengths.clamp(0, (inputs.x if inputs.q is None else inputs.q).shape[1])
    o = _scan(config, w_init, inputs, state, state.count, lengths, update)
    if update:
        state.count.add_(lengths)
    return o


def _scan(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, pos: Tensor, lengths: Tensor,
    update: bool
) -> Tensor:
    return torch.ops.hope_kernels.titans_scan(*arguments(config, w_init, inputs, state, pos, lengths, update))


def arguments(
    config: TitansConfig, w_init: FastWeights, inputs, state: TitansState, pos: Tensor, lengths: Tensor,
    update: bool
) -> tuple:
    """What ``hope_kernels::titans_scan`` takes, in order."""
    base = w_init if config.retain_to == "init" else (None, None, None)
    i, q = inputs, None if config.adaptive_q else inputs.q
    return (
        q, i.x, i.k, i.v, i.eta, i.alpha, i.beta, i.eta_bias, i.alpha_bias, *base,
        *(getattr(state, n) for n in CARRIED), pos, lengths, update, *(getattr(config, n) for n in _SETTINGS),
    )


_library = torch.library.Library("hope_kernels", "FRAGMENT")
_library.define(
    "titans_scan(Tensor? q, Tensor? x, Tensor? k, Tensor? v, Tensor? eta, Tensor? alpha, Tensor? beta, "
    "Tensor? eta_bias, Tensor? alpha_bias, Tensor? base2, Tensor? base1, Tensor? base1s, Tensor(a!) delta2, "
    "Tensor(b!) delta1, Tensor(c!)? delta1s, Tensor(d!)? s2, Tensor(e!)? s1, Tensor(f!)? s1s, "
    "Tensor(g!) pending_k, Tensor(h!) pending_v, Tensor(i!) pending_eta, Tensor(j!)? pending_alpha, "
    "Tensor(k!)? pending_beta, Tensor pos, Tensor lengths, bool update, "
    + ", ".join(f"{kind} {name}" for name, kind in _SETTINGS.items()) + ") -> Tensor"
)


class _Plan:
    """What a launch needs to know beyond its tensors; one per model, dtype, mode and architecture."""

    def __init__(
        self, H: int, D: int, N: int, dtype: torch.dtype, update: bool, momentum: bool, adaptive_q: bool,
        arch: int, settings: tuple
    ):
        more = {"momentum": "learned" if momentum else None, "adaptive_q": adaptive_q}
        config = TitansConfig(H * D, H, hidden_mult=N // D, **more, **dict(zip(_SETTINGS, settings)))
        itemsize = dtype.itemsize
        self.arguments = constants(config, itemsize, update, arch) | options(config, itemsize, arch)
        # programs that wait for each other cannot be interpreted, one after another
        self.carried = None
        if carried.carried(config, itemsize, arch) and not interpreted():
            self.carried = carried.constants(config, update) | carried.options()
        self.eta_scale = config.eta_scale
        self.grad_scale = 1.0 if config.objective == "dot" else config.grad_scale
        of_clocks = scratch_shapes(config, itemsize, arch)
        shapes = [item for clock in of_clocks for item in clock._asdict().items()]
        # a pure read touches none of it
        self.scratch = [
            (prod(shape) if update else 1, dtype if name in ROUNDED else torch.float32) for name, shape in shapes
        ]

    def scratch_of(self, groups: int, device: torch.device) -> tuple[Scratch, Scratch]:
        """The kernel's scratch for both clocks; a second one that the layer does not have is never touched,
        and shares the first one's."""
        sizes = [-(-groups * count * dtype.itemsize // 16) * 16 for count, dtype in self.scratch]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        parts = [part.view(dtype) for part, (_, dtype) in zip(whole.split(sizes), self.scratch)]
        size = len(Scratch._fields)
        return Scratch(*parts[:size]), Scratch(*parts[-size:])


_plan = lru_cache(maxsize=None)(_Plan)


def _launch(
    q, x, k, v, eta, alpha, beta, eta_bias, alpha_bias, base2, base1, base1s, delta2, delta1, delta1s, s2, s1, s1s,
    pending_k, pending_v, pending_eta, pending_alpha, pending_beta, pos, lengths, update, *settings,
) -> Tensor:
    first = x if q is None else q
    B, T, H, D = first.shape
    o = torch.zeros(B, T, H, D, dtype=first.dtype, device=first.device)
    if not B * T:
        return o
    arch = architecture(first.device)
    plan = _plan(H, D, delta1.shape[-1], first.dtype, update, s2 is not None, q is None, arch, settings)
    q = aligned(o if q is None else q)  # an adaptive q passes through o
    given = filled((x, k, v, eta, alpha, beta, base2, base1, base1s, eta_bias, alpha_bias), q)
    x, k, v, eta, alpha, beta, base2, base1, base1s, eta_bias, alpha_bias = map(aligned, given)
    states = [delta2, delta1, delta1s, s2, s1, s1s, pending_k, pending_v, pending_eta, pending_alpha, pending_beta]
    mine = [*map(aligned, filled(states, delta1))]
    sync = torch.zeros(counters(B * H), dtype=torch.int64, device=q.device)
    common = {
        "reads": Reads(x, q, o), "weights": Weights(base2, base1, base1s, *mine[:3]), "pending": Writes(*mine[6:]),
        "biases": Biases(eta_bias, alpha_bias), "progress": Progress(aligned(pos), aligned(lengths), sync),
        "eta_scale": plan.eta_scale, "grad_scale": plan.grad_scale,
    }
    with torch.cuda.device_of(q):
        if plan.carried is not None:
            carried.launch(plan.carried, **common)
        else:
            # no weights are read again that a call of one token writes; with momentum none are kept
            again = update and T > 1 and s2 is None
            in_force = [
                torch.empty(w.shape, dtype=kind, device=q.device) if again else given
                for w, kind, given in zip(mine[:3], (q.dtype, q.dtype, torch.float32), (q, q, mine[2]))
            ]
            fast_scratch, slow_scratch = plan.scratch_of(B * H, q.device)
            scan_kernel[(_programs(q.device),)](
                given=Writes(k, v, eta, alpha, beta), in_force=Weights(base2, base1, base1s, *in_force),
                momentum=Momentum(*mine[3:6]), fast_scratch=fast_scratch, slow_scratch=slow_scratch, B=B, T=T,
                **common, **plan.arguments,
            )
    for state, written in zip(states, mine):
        if state is not None and written is not state:
            state.copy_(written)
    return o


def _programs(device: torch.device) -> int:
    """A few for every multiprocessor; more than fit cost nothing, they start when others have left and find
    no ticket."""
    return 1 if interpreted() else 4 * multiprocessors(device)


_library.impl("titans_scan", _launch, "CPU")  # interpreted or emulated
_library.impl("titans_scan", _launch, "CUDA")


@torch.library.register_fake("hope_kernels::titans_scan", lib=_library)
def _(q, x, *others):
    return torch.empty_like(x if q is None else q, memory_format=torch.contiguous_format)
