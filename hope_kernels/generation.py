"""Reading long inputs in pieces of bounded memory, and writing on: greedy or sampled, learning or not, resumable at any token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode import Decoder
from .ops.check import check_lengths

PIECE = 4096  # tokens read per forward call: bounds activations and logits, whatever the prompt's length

Source = Callable[[int], Tensor]  # the next n tokens [B, n] of a text, fewer only where it ends


@dataclass
class Generation:
    """What ``generate`` returns. tokens [B, T_new] int64 (rows that stopped early are padded with their last token); lengths: new
    tokens per row; state: has read everything but the last token of each row. finished: False where ``should_stop`` ended it."""

    tokens: Tensor
    lengths: list[int]
    state: object
    finished: bool = True


@dataclass
class Reading:
    """What ``read`` returns: logits [B, vocab] after each row's last token (None if nothing was read), summed next-token loss in nats and
    number of predicted tokens per row, the state; finished: False where ``should_stop`` ended it, after ``tokens`` tokens."""

    logits: Tensor | None
    nats: Tensor
    predicted: list[int]
    state: object
    tokens: int
    finished: bool


@torch.no_grad()
def read(
    model, ids: Tensor | Source, state=None, lengths: Sequence[int] | None = None, learn: str = "off", backend: str | None = None,
    piece: int = PIECE, on_piece: Callable[[int, float], None] | None = None, check_finite: bool = True, last: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None, wavefront: int | None = None,
) -> Reading:
    """Reads ids [B, T] in pieces; memory does not grow with T (for attention without a window, the cache does).

    ids may also be a function that gives the next n tokens of a text, [B, n] int64 on the model's device, fewer only where it ends: then
    the text need not be in memory either. ``read`` asks for one piece ahead of the one it reads.
    on_piece(tokens read so far, nats so far of row 0) is called after every piece. last [B, vocab]: the logits before ids[:, 0],
    to count that token's loss too. should_stop is asked before every piece; once it says True, ``read`` returns with what has been read.
    Reading on from there, with ``last``, is the same computation as never having stopped. wavefront: as in the model's ``forward``, with
    learn="off": blocks side by side on CUDA streams; measure it before you use it, as nobody has.
    Raises what the model raises; the state then stands after the last whole piece.
    """
    if callable(ids) and lengths is not None:
        raise ValueError(f"read: argument lengths is {lengths}, expected None where ids is a function")
    take, lengths = (ids, None) if callable(ids) else (_slices(ids), check_lengths("read", lengths, *ids.shape))
    # pieces end on segment boundaries, so that whole segments are read in one call
    align = model.segment or 1
    piece = max(piece // align, 1) * align
    now = take(piece - (0 if state is None or not state.batch else state.pos[0] % align))
    B = now.shape[0]
    state = model.init_state(B) if state is None else state
    nats = torch.zeros(B, dtype=torch.float64, device=now.device)
    predicted, at, finished = [0] * B, 0, True
    while now.shape[1] and (lengths is None or at < max(lengths, default=0)):
        end = at + now.shape[1] if lengths is None else min(at + now.shape[1], max(lengths))
        now, ahead = now[:, : end - at], take(piece)
        if should_stop is not None and should_stop():
            finished = False
            break
        step = [end - at] * B if lengths is None else [min(max(n - at, 0), end - at) for n in lengths]
        logits, state = model(now, state, step, learn=learn, backend=backend, check_finite=check_finite, wavefront=wavefront)
        before = torch.zeros_like(logits[:, 0]) if last is None else last
        guesses = torch.cat([before.unsqueeze(1), logits[:, :-1]], 1)
        loss = F.cross_entropy(guesses.flatten(0, 1).float(), now.flatten(), reduction="none").unflatten(0, (B, -1)).double()
        counted = torch.arange(end - at, device=now.device) < torch.tensor(step, device=now.device).unsqueeze(1)
        if last is None:
            counted[:, 0] = False
        nats += (loss * counted).sum(1)
        predicted = [p + (n - (last is None) if n else 0) for p, n in zip(predicted, step)]
        pick = torch.tensor([max(n - 1, 0) for n in step], device=now.device)
        final = logits[torch.arange(B, device=now.device), pick]
        empty = torch.tensor([n == 0 for n in step], device=now.device).unsqueeze(1)
        last = final if last is None else torch.where(empty, last, final)
        now, at = ahead, end
        if on_piece is not None:
            on_piece(at, float(nats[0]))
    return Reading(last, nats, predicted, state, at, finished)


def _slices(ids: Tensor) -> Source:
    """ids [B, T] as a function that gives the next n tokens."""
    at = 0

    def take(n: int) -> Tensor:
        nonlocal at
        part, at = ids[:, at : at + n], at + n
        return part

    return take


@torch.no_grad()
def generate(
    model, ids: Tensor | Source | None, max_new_tokens: int, state=None, *, lengths: Sequence[int] | None = None, learn: str = "next_token",
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
    stop: Sequence[str | bytes | Sequence[int]] = (), on_token: Callable[[list[int | None]], None] | None = None,
    on_piece: Callable[[int, float], None] | None = None, backend: str | None = None, check_finite: bool = True, piece: int = PIECE,
    should_stop: Callable[[], bool] | None = None, graph: bool = False,
) -> Generation:
    """Reads ids [B, T] (in pieces; or a function that gives them, see ``read``) and writes up to ``max_new_tokens`` tokens per row.

    ids None continues a state that ``generate`` returned, from the token it has not read. temperature 0 is greedy; top_k keeps the k
    likeliest tokens, top_p the likeliest ones whose mass reaches p. Row b's draw at position t depends on (seed, b, t) alone, so a
    restored session draws what it would have drawn. stop: a row ends after any of these (strings count as UTF-8 bytes, for byte
    models). on_token gets the new token per row, None for rows that have ended. A state passed in is advanced in place.
    should_stop is asked before every piece and, once the prompt is read and one token written, before every further token; when it says
    True, ``generate`` returns what it has (no token at all, if it was still reading: go on with the rest of the prompt).
    graph: decode with a ``Decoder`` while no row has ended, which replays the step from a CUDA graph where that is possible (on CUDA with
    backend "triton" or "cuda"; never run on a GPU yet, hence on request). ValueError for a model with attention.
    Raises ValueError for an empty prompt and arguments out of range.
    """
    _check(model, ids, state, max_new_tokens, temperature, top_k, top_p, lengths)
    stops = [_stop_ids(model, s) for s in stop]
    if ids is None:
        ids = state.unread
    reading = read(model, ids, state, lengths, learn, backend, piece, on_piece, check_finite, should_stop=should_stop)
    logits, state = reading.logits, reading.state
    B, device = state.batch, reading.nats.device
    if not reading.finished:
        return Generation(torch.zeros(B, 0, dtype=torch.long, device=device), [0] * B, state, finished=False)
    if logits is None:
        raise ValueError("generate: empty prompt; every row needs at least one token")
    token = None
    rows: list[list[int]] = [[] for _ in range(B)]
    ended = [False] * B
    finished, decoder = True, None
    for n in range(max_new_tokens):
        if n:
            if should_stop is not None and should_stop():
                finished = False
                break
            if n == 1:
                decoder = Decoder(model, state, learn, backend) if graph else None
            if decoder is None or any(ended):
                step = [0 if e else 1 for e in ended]
                out, state = model(token.unsqueeze(1), state, step, learn=learn, backend=backend, check_finite=check_finite)
            else:
                out = decoder.step(token.unsqueeze(1))
                if check_finite and not torch.isfinite(out).all():
                    raise ValueError("generate: non-finite logits (weights, state or learning rates diverged); the state is past them")
            keep = torch.tensor(ended, device=device).unsqueeze(1)
            logits = torch.where(keep, logits, out[:, 0])
        token = _draw(logits, temperature, top_k, top_p, seed, state.pos)
        values = token.tolist()
        fresh = [None if e else v for e, v in zip(ended, values)]
        for b, v in enumerate(fresh):
            if v is not None:
                rows[b].append(v)
                ended[b] = any(rows[b][-len(s) :] == s for s in stops)
        if on_token is not None:
            on_token(fresh)
        if all(ended):
            break
    lengths_new = [len(r) for r in rows]
    width = max(lengths_new)
    tokens = torch.tensor([r + [r[-1]] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    state.unread = tokens[:, -1:].clone()
    return Generation(tokens, lengths_new, state, finished)


def _check(model, ids, state, max_new_tokens, temperature, top_k, top_p, lengths) -> None:
    def need(ok: bool, name: str, value, expected: str) -> None:
        if not ok:
            raise ValueError(f"generate: argument {name} is {value!r}, expected {expected}")

    need(isinstance(max_new_tokens, int) and max_new_tokens > 0, "max_new_tokens", max_new_tokens, "a positive integer")
    need(temperature >= 0, "temperature", temperature, "a number >= 0")
    need(top_k is None or (isinstance(top_k, int) and top_k > 0), "top_k", top_k, "a positive integer or None")
    need(top_p is None or 0 < top_p <= 1, "top_p", top_p, "a number in (0, 1] or None")
    if ids is None:
        if state is None or state.unread is None:
            raise ValueError("generate: argument ids is None, which needs a state that generate returned")
    elif not callable(ids) and (ids.dim() != 2 or ids.shape[1] == 0 or (lengths is not None and min(lengths) == 0)):
        raise ValueError(f"generate: empty prompt (ids has shape {list(ids.shape)}, lengths {lengths}); every row needs at least one token")


def _stop_ids(model, stop) -> list[int]:
    if isinstance(stop, str):
        stop = stop.encode()
    if isinstance(stop, bytes) and model.config.vocab_size != 256:
        raise ValueError(f"generate: stop strings need a byte model (vocab_size 256, not {model.config.vocab_size}); pass token ids")
    if len(stop) == 0:
        raise ValueError("generate: argument stop has an empty entry")
    return [int(t) for t in stop]


def _draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: int, pos: list[int]) -> Tensor:
    """One token per row, [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    draws = []
    for row, t in enumerate(pos):
        g = torch.Generator().manual_seed(hash((seed, row, t)) & (2**63 - 1))
        draws.append(torch.rand((), generator=g, dtype=torch.float64))
    u = torch.stack(draws).to(logits.device).unsqueeze(-1)
    mass = logits.softmax(-1).cumsum(-1)
    return (mass < u * mass[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
