"""What the tests share: layers with every weight moved off its special initial value, the reference run
beside them, yardsticks."""

from __future__ import annotations

import numpy as np
import torch

from hope_kernels import SelfModifyingTitans, TitansConfig
from hope_kernels.ops.titans import reference


def random_layer(config: TitansConfig, seed: int = 0, spread: float = 0.3) -> SelfModifyingTitans:
    """A layer in fp64 whose zero and one initial values are moved, so that every term of the equations is
    exercised."""
    torch.manual_seed(seed)
    layer = SelfModifyingTitans(config, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(spread * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
    return layer


def reference_params(layer: SelfModifyingTitans) -> dict:
    """The layer's parameters under the names of the NumPy reference."""
    params = {
        n.removesuffix(".weight"): p.detach().double().numpy()
        for n, p in layer.named_parameters() if n not in ("w2", "w1", "w1s")
    }
    for name in layer.layout.names:
        params |= {f"{part}.{name}": w.detach().double().numpy() for part, w in layer.memory_init(name).items()}
    return params


def reference_run(layer: SelfModifyingTitans, x: torch.Tensor, lengths=None):
    """(y, rows) of the reference on the layer's weights."""
    return reference.layer(layer.config, reference_params(layer), x.detach().double().numpy(), lengths=lengths)


def state_errors(layer: SelfModifyingTitans, state, rows) -> float:
    """Largest relative difference between a TitansState and the reference's rows, over deviations and
    momentum of all memories."""
    worst = 0.0
    for kind, stacked in (("delta", state.deviation), ("momentum", state.momentum)):
        if stacked is None:
            continue
        for name in layer.layout.names:
            for part, ours in layer.layout.views(stacked, name).items():
                theirs = np.array([[getattr(head, kind)[name][part] for head in row.heads] for row in rows])
                worst = max(worst, relative(ours, theirs))
    return worst


def relative(ours, theirs) -> float:
    """max |ours - theirs| / max(1, max |theirs|)."""
    ours = ours.detach().double().numpy() if isinstance(ours, torch.Tensor) else ours
    theirs = theirs.detach().double().numpy() if isinstance(theirs, torch.Tensor) else theirs
    if ours.size == 0:
        return 0.0
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    return float(error) if np.isfinite(error) else float("inf")


def correlated(x: torch.Tensor, share: float) -> torch.Tensor:
    """Tokens x [B, T, d] mixed with one common direction, so that keys correlate."""
    return (1 - share) ** 0.5 * x + share**0.5 * x[:, :1].roll(1, 1)


def rms(t: torch.Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def within_yardstick(
    ours: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor, name: str, *noisy: torch.Tensor
) -> None:
    """rms(ours - exact) is at most twice that of ``peer`` (chunked PyTorch in the same dtype), or 8 eps of
    the dtype, whichever is more, or fp32's smallest normal number, below which kernels may flush; with
    ``noisy``, exact results on inputs with noise, also ten times their largest difference from ``exact`` is
    allowed."""
    assert ours.dtype == peer.dtype and ours.shape == exact.shape
    if not ours.numel():
        return
    allowed = max(
        2 * rms(peer - exact), 8 * torch.finfo(ours.dtype).eps * rms(exact), torch.finfo(torch.float32).tiny
    )
    allowed = max(allowed, *(10 * rms(t - exact) for t in noisy), 0.0)
    error = rms(ours - exact)
    assert error <= allowed, f"{name}: rms error {error:.2e}, allowed {allowed:.2e}"
