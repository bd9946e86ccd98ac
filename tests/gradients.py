"""Gradients of a call of the memory, and whether they meet the yardstick."""

from dataclasses import replace

import torch
from numerics import within_yardstick
from problems import DEVICE, noisy, part, problem

from hope_kernels import TitansConfig
from hope_kernels.ops.titans import scan as chunked
from hope_kernels.ops.titans.state import init_titans_state
from hope_kernels.ops.titans.triton.spans import CARRIED
from hope_kernels.state import master_dtype

OPEN = {"pos": [20, 7], "lengths": [14, 12]}  # one row closes its second chunk, one its first

# write rules that a gradient has to know of
RULES = {
    "two clocks, silu": TitansConfig(32, 1, chunk_memory=32, chunk_other=16, activation="silu"),
    "slow others, no retention": TitansConfig(32, 1, chunk_memory=16, chunk_other=32, target_norm=False,
        own_values=False, retention=False),
    "nested_learning": TitansConfig.preset("nested_learning", d_model=32, chunk_memory=16, chunk_other=16),
    "dot, free keys": TitansConfig(32, 1, objective="dot", step_clip=False, qk_l2norm=False, scalar_skip=True,
        eta_scale=0.02),
    "no dgd, gelu, skip": TitansConfig(32, 1, scalar_skip=True, activation="gelu", grad_scale=2.0,
        own_values=False, dgd=False),
    "zero, softplus": TitansConfig(32, 1, objective="dot", retain_to="zero", eta_activation="softplus",
        chunk_memory=32, chunk_other=32),
    "static, two heads": TitansConfig.preset("titans", d_model=64, num_heads=2, momentum=None, dgd=True,
        step_clip=True, hidden_mult=2),
    "static, bare": TitansConfig.preset("titans", d_model=32, momentum=None, retention=False),
}


def leaves(found, dtype):
    return type(found)(*(None if t is None else t.detach().to(DEVICE, dtype).requires_grad_() for t in found))


def start(config, w_init, before, rows, pos, dtype):
    """The state after ``pos`` tokens of ``before`` in fp64, its tensors leaves in the types of a call in
    ``dtype``."""
    state = init_titans_state(config, w_init, rows, "cpu", torch.float64)
    if before is not None:
        with torch.no_grad():
            state = chunked.titans_chunk(config, w_init, before, state, pos)[1]
    kinds = {n: dtype if n in ("pending_k", "pending_v") else master_dtype(dtype) for n in CARRIED}
    given = {n: getattr(state, n) for n in CARRIED}
    return replace(
        state, **{n: None if t is None else t.to(DEVICE, kinds[n]).requires_grad_() for n, t in given.items()}
    )


def gradients(compute, config, w_init, inputs, dtype, lengths=None, before=None, pos=None, cuts=None, **options):
    """Gradients, by name, of a fixed random linear function of everything a call returns; the call may be
    ``cuts``."""
    w, i = leaves(w_init, dtype), leaves(inputs, dtype)
    B, T = i.q.shape[:2]
    lengths, cuts = lengths or [T] * B, cuts or [0, T]
    first = new = start(config, w_init, before, B, pos, dtype)
    outputs = []
    for a, b in zip(cuts, cuts[1:]):
        counts = [min(max(n - a, 0), b - a) for n in lengths]
        o, new = compute(config, w, part(i, a, b), new, counts, **options)
        read = torch.arange(b - a, device=DEVICE) < torch.tensor(counts, device=DEVICE).unsqueeze(1)
        outputs.append(torch.where(read[..., None, None], o, 0.0))
    loss, generator = 0.0, torch.Generator().manual_seed(7)
    for t in (torch.cat(outputs, 1), *(getattr(new, n) for n in CARRIED)):
        if t is not None and t.requires_grad:
            loss = loss + (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum()
    named = dict(zip(w._fields, w)) | dict(zip(i._fields, i)) | {f"state.{n}": getattr(first, n) for n in CARRIED}
    named = {n: t for n, t in named.items() if t is not None}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g.cpu() for n, g in zip(named, grads) if g is not None}


def meets_yardstick(config, w_init, inputs, dtype=torch.float32, cuts=None, compute=None, **call):
    """compute: the backend that is judged; None: the Triton kernels."""
    if compute is None:
        from hope_kernels.ops.titans.triton.training import titans_triton_training as compute
    exact = gradients(chunked.titans_chunk, config, w_init, inputs, torch.float64, **call)
    peer = gradients(chunked.titans_chunk, config, w_init, inputs, dtype, **call)
    ours = gradients(compute, config, w_init, inputs, dtype, cuts=cuts, **call)
    # a head's bias has one number for a gradient, a sum of cancelling terms: any backend's error in it is
    # partly luck
    shaken = gradients(chunked.titans_chunk, config, noisy(w_init), noisy(inputs), torch.float64, **call)
    assert exact.keys() <= ours.keys()
    for name, g in ours.items():
        if name in exact:
            noise = [shaken[name]] if name.endswith("bias") and dtype == torch.float32 else []
            within_yardstick(g, peer[name], exact[name], name, *noise)
        else:
            assert not g.any(), f"{name} reaches nothing"


def opened(config, correlation=0.5):
    """A ragged problem whose rows stand inside open chunks at different places."""
    w_init, inputs = problem(config, 2, OPEN["lengths"][0], correlation)
    return (config, w_init, inputs), {"before": problem(config, 2, 20, correlation, seed=3)[1], **OPEN}
