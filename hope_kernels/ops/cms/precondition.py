"""Steps that keep what was learned: a gradient is taken in the directions that earlier inputs left free.

    with the inputs X [C, c] of a step, P = I at the start, and r = rho C^(l) (C^(l): the level's period)

    G = E^T X  becomes  G P        then  P <- P - P X^T (r I + X P X^T)^-1 X P

So P = (I + sum X^T X / r)^-1 over all inputs so far (Woodbury; recursive least squares). A direction that
inputs have filled many times learns little more, and what the matrix makes of it stays; rho -> infinity is the
plain step. A level that sums up several segments steps with the P from before the first of them, while a
second one takes their inputs up, one segment at a time. The sum X^T X in its place would be the same in real
arithmetic; in fp32, solving with it made P indefinite where inputs are few and rho is small.

One P for each distinct input of a row's level: ``up`` and ``gate`` share one. All in the master dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...config import CMSConfig
from ...state import master_dtype

if TYPE_CHECKING:
    from .level import Factors
    from .state import CMSState

SOURCE = {"up": "up", "gate": "up", "down": "down"}  # matrix -> the matrix whose P it takes: one for each input


def take_up_(P: Tensor, X: Tensor, ridge: float) -> Tensor:
    """Returns X P, and P [c, c] takes the inputs X [C, c] up, in place, at most c at a time. ridge: r.

    With the Cholesky factor L of r I + X P X^T it is P - Z^T Z, Z = L^-1 X P; then made symmetric again:
    rounding makes its halves differ, and the difference would grow from step to step.
    """
    whole = XP = X @ P
    for i, part in enumerate(X.split(P.shape[0])):
        XP = part @ P if i else XP[: len(part)]
        system = XP @ part.mT
        system.diagonal().add_(ridge)
        L, _ = torch.linalg.cholesky_ex(system)  # does not raise: a NaN stays in its row
        Z = torch.linalg.solve_triangular(L, XP, upper=False)
        P.addmm_(Z.mT, Z, alpha=-1)
        P.copy_((P + P.mT).mul_(0.5))
    return whole


def preconditioned(state: CMSState, config: CMSConfig, l: int, factors: Factors, rows: list[int]) -> Factors:
    """``factors`` of a step in ``rows`` with X P in the place of X; their P takes X up. Level ``l`` of a draft."""
    held = _inverses(state, l, _inputs(factors))
    rights = {n: factors[n][1].clone() for n in held}
    for name, P in held.items():
        for b in rows:
            X = factors[name][1][b].to(P.dtype)
            rights[name][b] = take_up_(P[b], X, ridge(config, l))
    if state.following[l] is not None:
        _agree(state, l, "following", rows)
    return {n: (left, rights[SOURCE[n]]) for n, (left, _) in factors.items()}


def precondition_total_(state: CMSState, l: int, total: dict[str, Tensor], rows: list[int]) -> None:
    """What ``rows`` have summed up becomes total P, and their P the one that has taken those inputs up."""
    held = state.inverses[l]
    if held is not None:
        for name, g in total.items():
            for b in rows:
                g[b].copy_(g[b] @ held[SOURCE[name]][b])
    if state.following[l] is not None:
        _agree(state, l, "inverses", rows)


def take_up_later_(state: CMSState, config: CMSConfig, l: int, factors: Factors, rows: list[int]) -> None:
    """The P that ``rows`` have from their next commit on takes the inputs of ``factors`` up."""
    for name, P in _following(state, l, _inverses(state, l, _inputs(factors))).items():
        for b in rows:
            take_up_(P[b], factors[name][1][b].to(P.dtype), ridge(config, l))


def forget_(state: CMSState, l: int, rows: list[int]) -> None:
    """P = I in ``rows``."""
    for part in ("inverses", "following"):
        for P in state.writable(part, l).values() if getattr(state, part)[l] is not None else ():
            for b in rows:
                P[b].zero_().diagonal().fill_(1)


def forget_later_(state: CMSState, l: int, rows: list[int]) -> None:
    """What ``rows`` have summed up since their last commit is forgotten, and its inputs are."""
    if state.following[l] is not None:
        _agree(state, l, "following", rows)


def ridge(config: CMSConfig, l: int) -> float:
    """r"""
    assert config.precondition is not None
    return config.precondition * config.chunks[l]


def inverses_of(
    state: CMSState, config: CMSConfig, l: int, like: Callable[[], dict[str, Tensor]], later: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """P of all rows, and with ``later``, or where there are any, those that they are to have from their next commit on,
    by the name of their matrix, for a draft to write into; nothing without ``precondition``. like: what is learned of
    the level's matrices, [.., inputs]."""
    if config.precondition is None:
        return {}, {}
    held = _inverses(state, l, {} if state.inverses[l] is not None else like())
    return held, {} if not later and state.following[l] is None else _following(state, l, held)


def _inputs(factors: Factors) -> dict[str, Tensor]:
    return {n: X for n, (_, X) in factors.items()}


def _inverses(state: CMSState, l: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    if state.inverses[l] is not None:
        return state.writable("inverses", l)

    def unit(X: Tensor) -> Tensor:
        eye = torch.eye(X.shape[-1], dtype=master_dtype(X.dtype), device=X.device)
        return eye.expand(state.batch, -1, -1).clone(memory_format=torch.contiguous_format)

    return state.put("inverses", l, {n: unit(X) for n, X in like.items() if SOURCE[n] == n})


def _following(state: CMSState, l: int, held: dict[str, Tensor]) -> dict[str, Tensor]:
    if state.following[l] is None:
        return state.put("following", l, {n: P.clone() for n, P in held.items()})
    return state.writable("following", l)


def _agree(state: CMSState, l: int, part: str, rows: list[int]) -> None:
    """``part``, one of inverses and following, becomes what the other is."""
    other = state.following[l] if part == "inverses" else state.inverses[l]
    for name, P in state.writable(part, l).items():
        for b in rows:
            P[b].copy_(other[name][b])
