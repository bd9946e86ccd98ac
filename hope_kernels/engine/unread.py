"""The token at the end of a generated text, which its state has not read yet: whatever continues the text
reads it first, exactly once.

``ModelState.unread`` [B, 1] int64 holds it; -1 in rows that have read it since. None means -1 everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def left(unread: Tensor | None, lengths: list[int]) -> Tensor | None:
    """What is still unread once rows have read ``lengths`` tokens, the first of which was the unread one."""
    if unread is None or all(lengths):
        return None
    return torch.where(torch.tensor(lengths, dtype=torch.long, device=unread.device).unsqueeze(1) > 0, -1, unread)


def check_read_next(op: str, unread: Tensor | None, ids: Tensor, lengths: list[int]) -> None:
    """Raises ValueError where a row of ids [B, T] that has tokens does not begin with its unread one."""
    if unread is None or unread is ids or not ids.shape[1]:
        return
    for row, (token, first, n) in enumerate(zip(unread.flatten().tolist(), ids[:, 0].tolist(), lengths)):
        if n and token not in (-1, first):
            raise ValueError(
                f"{op}: argument state has not read token {token} of row {row}, the last one that generate "
                f"returned, and ids begin with {first}; put it in front of ids, or set state.unread = None to "
                "leave it out of the text"
            )


def mode_of(op: str, mode: str | None, unread: Tensor, first: Tensor, lengths: list[int] | None) -> str:
    """"before" or "included", where that is certain. first [B, 0 to 2]: how ids begin; lengths: tokens per
    row, None where all is given.

    ids that do not begin with the unread token in every row that has tokens cannot include it. ids that are
    nothing but the unread tokens are the documented way to continue. Raises ValueError where longer ids begin
    with it: that may be it, or the next text's own.
    """
    tokens = unread.flatten().tolist()
    if mode == "included" or all(t == -1 for t in tokens):
        return "included"
    if -1 in tokens:
        raise ValueError(f"{op}: some rows of argument state have an unread token and others have none "
                         f"(state.unread is {tokens}); read it with the model first, or set state.unread = None")
    if mode is not None:
        return mode
    counts = [first.shape[1]] * len(tokens) if lengths is None else lengths
    same = [a == b[0] for a, b, n in zip(tokens, first.tolist(), counts) if n]
    if not same or not all(same):
        return "before"
    if all(n == 1 for n in counts):
        return "included"
    raise ValueError(
        f"{op}: ids begin with the token {tokens if len(tokens) > 1 else tokens[0]} that the state has not read; "
        "pass unread='included' if this is that token, or unread='before' if ids are a text of their own after it"
    )
