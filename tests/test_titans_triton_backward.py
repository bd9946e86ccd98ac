"""Training through the memory's Triton kernels, interpreted: gradients against fp64 autograd of the chunked backend."""

import pytest
import torch
from numerics import relative, within_yardstick
from problems import part, problem

from hope_kernels import TitansConfig, available_backends
from hope_kernels.ops.titans import chunked
from hope_kernels.ops.titans.fast_weights import init_titans_state

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=f"triton: {available_backends()['triton']}")
if available_backends()["triton"] is None:
    from hope_kernels.ops.titans import triton_training
    from hope_kernels.ops.titans.triton_training import CARRIED, titans_triton_training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def leaves(found, dtype):
    return type(found)(*(None if t is None else t.detach().to(DEVICE, dtype).requires_grad_() for t in found))


def starting(config, w_init, inputs, pos, dtype):
    """A state whose tensors are leaves, after the chunked backend has read ``pos`` tokens of each row."""
    first = inputs.x if inputs.x is not None else inputs.k
    with torch.no_grad():
        state = init_titans_state(config, w_init, first.shape[0], first.device, torch.float64)
        _, state = chunked.titans_chunk(config, w_init, inputs, state, pos)
    return {n: None if t is None else t.to(DEVICE, dtype) for n in CARRIED for t in [getattr(state, n)]}, state


def errors_of(shapes):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def gradients(compute, config, w_init, inputs, dtype, lengths=None, before=None, pos=None, cuts=None, update=True):
    """Outputs, and the gradients of a random linear function of them, by name. ``before``: fp64 inputs read first, ``pos`` of each row."""
    w, i = leaves(w_init, dtype), leaves(inputs, dtype)
    first = i.x if i.x is not None else i.k
    B, T = first.shape[:2]
    lengths = lengths or [T] * B
    if before is None:
        state = init_titans_state(config, w_init, B, DEVICE, torch.float64)
    else:
        with torch.no_grad():
            state = init_titans_state(config, w_init, B, "cpu", torch.float64)
            _, state = chunked.titans_chunk(config, w_init, before, state, pos)
    given = {n: leaves((t,), dtype)[0] if isinstance(t, tuple) else t for n, t in ((n, getattr(state, n)) for n in CARRIED)}
    masters = {n for n in CARRIED if not n.startswith(("pending_k", "pending_v"))}
    master = torch.float64 if dtype == torch.float64 else torch.float32
    given = {n: None if t is None else t.detach().to(DEVICE, master if n in masters else dtype).requires_grad_() for n, t in given.items()}
    state = chunked.replace(state, **given)
    outputs, new = [], state
    cuts = cuts or [0, T]
    for a, b in zip(cuts, cuts[1:]):
        o, new = compute(config, w, part(i, a, b), new, [min(max(n - a, 0), b - a) for n in lengths], update=update)
        real = torch.arange(b - a, device=DEVICE) + a < torch.tensor(lengths, device=DEVICE).unsqueeze(1)
        outputs.append(torch.where(real[..., None, None], o, 0.0))
    ends = [torch.cat(outputs, 1), *(getattr(new, n) for n in CARRIED)]
    ends = [t for t in ends if t is not None]
    errors = errors_of([t.shape for t in ends])
    loss = sum((t * e.to(t)).sum() for t, e in zip(ends, errors))
    named = {f"w_init.{n}": t for n, t in zip(w._fields, w)} | dict(zip(i._fields, i)) | {f"state.{n}": t for n, t in given.items()}
    named = {n: t for n, t in named.items() if t is not None}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return torch.cat(outputs, 1), {n: g for n, g in zip(named, grads) if g is not None}


def meets_yardstick(config, w_init, inputs, dtype=torch.float32, **call):
    _, exact = gradients(chunked.titans_chunk, config, w_init, inputs, torch.float64, **call)
    _, peer = gradients(chunked.titans_chunk, config, w_init, inputs, dtype, **call)
    _, ours = gradients(titans_triton_training, config, w_init, inputs, dtype, **call)
    assert exact.keys() <= ours.keys()
    bad = []
    for name, g in ours.items():
        if name not in exact:
            assert not g.any(), name
            continue
        try: within_yardstick(g.cpu(), peer[name].cpu(), exact[name].cpu(), name)
        except AssertionError as e: bad.append(str(e) + f" rms {exact[name].square().mean().sqrt():.2e}")
    assert not bad, "\n".join(bad)
