"""The head over a few tokens at a time: losses, and their gradient, without the logits of a whole call.

Logits are V numbers a token: those of 4096 tokens of a vocabulary of 49152 are 0.8 GB in fp32, and their loss
and its gradient as much again each. Nothing needs them together. A piece of ``PIECE_BYTES`` of them is made,
and with p = softmax(logits)

    loss_t       = -log p[target_t]
    dL/dlogits_t = p - onehot(target_t)
    dL/dh        = the head's own backward, called on the piece

are taken from it before the next one is made. Softmax and loss are in fp32 (fp64 for fp64), logits and what
the head's backward is given in the model's dtype, as PyTorch's autograd has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import check_values
from ..layers.wrapped import placement
from ..state import master_dtype
from .protocol import Model

PIECE_BYTES = 2**25  # of logits, in the dtype that the softmax is taken in
OP = "HopeForCausalLM"


class Losses(NamedTuple):
    """What a reading returns in place of logits. nats: [B, T], fp32 (fp64 for fp64), the loss of predicting
    the token after each one, 0 where that is not known; last: [B, V], the logits after each row's last token
    (zero in a row that has none)."""

    nats: Tensor
    last: Tensor


class Targets(NamedTuple):
    """What follows each token. ids: [B, n] int64; known: tokens of each row whose next one is known, the
    first ones."""

    ids: Tensor
    known: list[int]


class Heads(NamedTuple):
    """What the head made of h [B, n, d]. logits: [B, n, V], where they were asked for; nats, last: as
    ``Losses``, where targets were given; slopes: [B, n, d], dL/dh, where the loss was to be differentiated."""

    logits: Tensor | None
    nats: Tensor | None
    last: Tensor | None
    slopes: Tensor | None


def read_head(
    model: Model, h: Tensor, lengths: list[int], targets: Targets | None, *, logits: bool = True,
    learners: list[bool] | None = None, check_finite: bool = False, least: float = 0.0,
    finite: Tensor | None = None, backend: str | None = None,
) -> Heads:
    """The head over h [B, n, d], of which ``lengths`` tokens a row count.

    targets: for the losses; None: there are none. logits: whether they are kept. learners: rows whose losses
    are summed and differentiated by h, under any grad mode; the model's parameters get no gradient. least:
    losses below it, in nats, are not differentiated. finite: a bool on the device that becomes false, in
    place, where a logit is not finite (of tokens that do not count, too): a look that does not wait for the
    device.
    Raises ValueError for non-finite logits, with ``check_finite``.
    """
    if targets is None:
        whole = model.logits(h, lengths, backend)
        if check_finite:
            check_logits(whole, lengths)
        return Heads(whole, None, None, None)
    B, n = h.shape[:2]
    kind, V = placement(model.embed).dtype, model.config.vocab_size
    wide = master_dtype(kind)
    parts, nats, slopes = [], [], []
    last = torch.zeros(B, V, dtype=kind, device=h.device)
    for a, b in spans(B, n, V * wide.itemsize):
        here = [min(max(m - a, 0), b - a) for m in lengths]
        known = [min(max(m - a, 0), b - a) for m in targets.known]
        part = h[:, a:b]
        if learners is None:
            piece = model.logits(part, here, backend)
            loss = _losses(piece.to(wide), targets.ids[:, a:b], known)
        else:
            piece, loss, slope = _differentiated(
                model, part, here, targets.ids[:, a:b], known, learners, least, wide, backend
            )
            slopes.append(slope)
        if check_finite:
            check_logits(piece, here)
        if finite is not None:
            finite.logical_and_(torch.isfinite(piece).all())
        nats.append(loss)
        rows = [r for r, m in enumerate(lengths) if a < m <= b]
        if rows:
            places = [lengths[r] - 1 - a for r in rows]
            alike = len(rows) == B and len(set(places)) == 1  # then no index has to come from the host
            ends = piece[:, places[0]].clone() if alike else piece[rows, places]
            last = ends if len(rows) == B else last.index_copy(0, torch.tensor(rows, device=h.device), ends)
        if logits:
            parts.append(piece)
    empty = h.new_zeros(B, 0, dtype=wide)
    return Heads(
        joined(parts) if parts else model.logits(h, lengths, backend) if logits else None,
        joined(nats) if nats else empty, last, joined(slopes) if slopes else None
    )


def drift(model: Model, h: Tensor, own: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """KL(model at ``own`` || model at ``h``), [B, n] nats, of the next token's distribution; and the gradient of
    its sum by h, [B, n, d]: p_h - p_own, through the head. Both are what the blocks made of the same tokens."""
    (B, n), wide = h.shape[:2], master_dtype(placement(model.embed).dtype)
    found, slopes = [], []
    for a, b in spans(B, n, model.config.vocab_size * wide.itemsize):
        lengths = [b - a] * B
        with torch.enable_grad():
            part = h[:, a:b].detach().requires_grad_()
            logits = model.logits(part, lengths, backend)
        with torch.no_grad():
            was = F.log_softmax(model.logits(own[:, a:b], lengths, backend).to(wide), -1)
            now = F.log_softmax(logits.detach().to(wide), -1)
            found.append((was.exp() * (was - now)).sum(-1))
            slope = now.exp_().sub_(was.exp_()).to(logits.dtype)
            del was, now
        slopes.append(torch.autograd.grad(logits, part, slope)[0])
    return joined(found), joined(slopes)


def spans(batch: int, tokens: int, size: int) -> list[tuple[int, int]]:
    """[a, b) of the pieces of ``batch`` rows of ``tokens``, each of which needs ``size`` bytes."""
    step = max(PIECE_BYTES // max(batch * size, 1), 1)
    return [(a, min(a + step, tokens)) for a in range(0, tokens, step)] if batch else []


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def mask(counts: list[int], tokens: int, device: torch.device) -> Tensor:
    """[B, tokens]: true for the first ``counts`` tokens of each row."""
    count = torch.tensor(counts, dtype=torch.long, device=device).unsqueeze(1)
    return torch.arange(tokens, device=device) < count


def _losses(logits: Tensor, ids: Tensor, known: list[int]) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").unflatten(0, ids.shape)
    if min(known) == ids.shape[1]:
        return loss
    return torch.where(mask(known, ids.shape[1], ids.device), loss, 0)


def _differentiated(
    model: Model, h: Tensor, lengths: list[int], ids: Tensor, known: list[int], learners: list[bool], least: float,
    wide: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, losses, d(sum of the learners' losses)/dh) of a piece; two numbers in ``wide`` a logit are
    held at once."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        logits = model.logits(h, lengths, backend)
    with torch.no_grad():
        p = F.log_softmax(logits.detach().to(wide), -1)
        index = ids.unsqueeze(-1)
        loss = -p.gather(-1, index).squeeze(-1)
        p.exp_().scatter_add_(-1, index, p.new_full((), -1).expand(index.shape))
        counts = [m if r else 0 for m, r in zip(known, learners)]
        if min(counts) < ids.shape[1]:
            p.mul_(mask(counts, ids.shape[1], ids.device).unsqueeze(-1))
        if least > 0:
            p.mul_((loss >= least).unsqueeze(-1))  # false for a NaN: its slope stays NaN
        if min(known) < ids.shape[1]:
            loss = torch.where(mask(known, ids.shape[1], ids.device), loss, 0)
        slope = p.to(logits.dtype)
        del p
    (found,) = torch.autograd.grad(logits, h, slope)
    return logits.detach(), loss, found


def check_logits(logits: Tensor, lengths: list[int]) -> None:
    """Raises ValueError for values that are not finite among those that count."""
    check_values(OP, "logits (weights, state or learning rates diverged)", logits, lengths)
