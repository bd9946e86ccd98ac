"""Reading long inputs in pieces of bounded memory, and writing on: greedy or sampled, learning or not,
resumable at any token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import check_integer, check_number, check_tensor
from ..model_state import ModelState
from . import native, segments
from .decoder import Decoder
from .head import mask
from .options import PIECE, OnPiece, Options, check_callbacks
from .protocol import Model
from .source import Opened, Source, opened
from .stops import Stop, end_tokens, stop_sequences
from .writing import Writing


@dataclass
class Generation:
    """What ``generate`` returns. tokens [B, T_new] int64 (rows that stopped early are padded with their last
    token); lengths: new tokens per row; state: has read everything but the last token of each row, which is
    its ``unread``. finished: False where ``should_stop`` ended it."""

    tokens: Tensor
    lengths: list[int]
    state: ModelState
    finished: bool = True


@dataclass
class Reading:
    """What ``read`` returns: logits [B, vocab] after each row's last token (None if nothing was read), summed
    next-token loss in nats and number of predicted tokens per row, the state; finished: False where
    ``should_stop`` ended it, after ``tokens`` tokens of ids."""

    logits: Tensor | None
    nats: Tensor
    predicted: list[int]
    state: ModelState
    tokens: int
    finished: bool


@torch.no_grad()
def read(
    model: Model, ids: Tensor | Source, state: ModelState | None = None, lengths: Sequence[int] | None = None,
    learn: str = "off", backend: str | None = None, piece: int = PIECE, on_piece: OnPiece | None = None,
    check_finite: bool = True, last: Tensor | None = None, should_stop: Callable[[], bool] | None = None,
    wavefront: int | None = None, unread: str | None = None, replay: int = 0, seed: int = 0, guard: bool = True,
    graph: bool = False,
) -> Reading:
    """Reads ids [B, T] int64 in pieces; memory does not grow with T (for attention without a window, the
    cache does).

    ids may also be a function that gives the next n tokens of a text, [B, n] int64 on the model's device,
    fewer only where it ends: then the text need not be in memory either. ``read`` asks for one piece ahead of
    the one it reads.
    on_piece(tokens of ids read so far, nats so far of row 0) is called after every piece. last [B, vocab]:
    the logits before the first token read, to count that token's loss too. should_stop is asked before every
    piece; once it says True, ``read`` returns with what has been read. Reading on from there, with ``last``,
    is the same computation as never having stopped. wavefront: as in the model's ``forward``, with
    learn="off": blocks side by side on CUDA streams; it has never been timed, so measure before you use it.

    unread: what ids have to do with the token of each row that ``generate`` returned last and a given state
    has not read. "before": ids are the text after it, so it is read first (also by rows of length 0).
    "included": ids begin with it. None: "included" if ids are nothing but these tokens (``out.tokens[:,
    -1:]``), "before" if ids begin otherwise; ids that begin with it and go on could be either, and are a
    ValueError.

    replay, seed: with learn="next_token", from here on the state keeps so many of the segments that it learns,
    for the model's ``replay`` (0: as many as it keeps already, which may be none). seed: of which ones.
    guard: as in the model's ``forward``, with learn="next_token".
    graph: with learn="next_token" on CUDA, learn whole segments from CUDA graphs where that is possible
    (``engine/segment_graphs.py``; never run on a GPU yet, hence on request). The bits are the same.

    Raises ValueError for arguments out of range, TypeError for ids, last or a state of another kind, and what
    the model raises; the state then stands after the last whole piece, with ``graph`` possibly inside the one
    after it.
    """
    options = Options(
        op="read", learn=learn, backend=backend, piece=piece, on_piece=on_piece, check_finite=check_finite,
        should_stop=should_stop, unread=unread, guard=guard, graph=graph, last=last, wavefront=wavefront,
        replay=replay, seed=seed,
    )
    return _read(model, opened("read", model, ids, state, lengths, unread), state, options)


def _read(model: Model, text: Opened, state: ModelState | None, options: Options) -> Reading:
    """``read``, after the checks of its arguments."""
    (take, lengths, lead), last = text, options.last
    # pieces end on segment boundaries, so that whole segments are read in one call
    align = model.segment or 1
    piece = max(options.piece // align, 1) * align
    now = take(piece - (0 if state is None or not state.batch else state.pos[0] % align))
    B = now.shape[0]
    if last is not None:
        check_tensor("read", "last", last, (B, model.config.vocab_size), device=now.device)
    state = model.init_state(B) if state is None else state
    if options.replay and model.learns:
        segments.keep(state, options.replay, options.seed)
    nats = torch.zeros(B, dtype=torch.float64, device=now.device)
    predicted, at, finished, graphs = [0] * B, 0, True, options.graphs(model, state)
    while now.shape[1] and (lengths is None or at < max(lengths, default=0)):
        end = at + now.shape[1] if lengths is None else min(at + now.shape[1], max(lengths))
        now, ahead = now[:, : end - at], take(piece)
        if options.stopped():
            finished = False
            break
        step = [end - at] * B if lengths is None else [min(max(n - at, 0), end - at) for n in lengths]
        following, found = None, None
        if graphs is not None and ahead.shape[1] and all(n > end for n in lengths or []):
            found = graphs.read(now, ahead[:, 0], options.guard, options.check_finite)
        if found is None and ahead.shape[1]:
            known = [lengths is None or n > end for n in lengths or [0] * B]
            following = torch.where(torch.tensor(known, device=now.device), ahead[:, 0], -1)
        if found is None:
            found, state = options.call(
                model, now, state, step, wavefront=options.wavefront, output="losses", following=following
            )
        # the loss of what follows is counted with the piece that reads it
        nats += torch.where(mask([n - 1 for n in step], end - at, now.device), found.nats, 0).double().sum(1)
        some = torch.tensor([n > 0 for n in step], dtype=torch.bool, device=now.device)
        if last is not None:
            first = F.cross_entropy(last.to(found.nats.dtype), now[:, 0], reduction="none")
            nats += torch.where(some, first, 0)
        predicted = [p + (n - (last is None) if n else 0) for p, n in zip(predicted, step)]
        last = found.last if last is None else torch.where(some.unsqueeze(1), found.last, last)
        now, at = ahead, end
        if options.on_piece is not None:
            options.on_piece(max(at - lead, 0), float(nats[0]) if B else 0.0)
    return Reading(last, nats, predicted, state, max(at - lead, 0), finished)


@torch.no_grad()
def generate(
    model: Model, ids: Tensor | Source | None, max_new_tokens: int, state: ModelState | None = None, *,
    lengths: Sequence[int] | None = None, learn: str = "next_token", temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Stop | Sequence[Stop] = (),
    eos_token_id: int | Sequence[int] | None = None,
    on_token: Callable[[list[int | None]], None] | None = None, on_piece: OnPiece | None = None,
    backend: str | None = None, check_finite: bool = True, piece: int = PIECE,
    should_stop: Callable[[], bool] | None = None, graph: bool = False, unread: str | None = None,
    guard: bool = True,
) -> Generation:
    """Reads ids [B, T] int64 (in pieces; or a function that gives them, see ``read``) and writes up to
    ``max_new_tokens`` tokens per row.

    A state that ``generate`` returned has not read the last token of each row. ids None, like ids =
    out.tokens[:, -1:], continues from there; other ids are the text after it, and the token is read first.
    ids of several tokens that begin with it could mean either, a ValueError: say unread="included" if they
    begin with that token, "before" if they are the text after it (see ``read``).

    temperature 0 is greedy; top_k keeps the k likeliest tokens (of equals the lowest ids), top_p of these the
    likeliest ones whose mass reaches p. seed: any int. Row b's draw at position t depends on (seed, b, t)
    alone, so a restored session draws what it would have drawn. stop: a row ends after any of these new
    tokens: a string (UTF-8; byte models only), bytes, a sequence of token ids, or a list of several such; a
    flat list of ints is one sequence. eos_token_id: ids, each of which ends a row too. on_token gets the new
    token per row, None for rows that have ended. A state passed in is advanced in place. should_stop is asked
    before every piece and, once the prompt is read and one token written, before every further token; when it
    says True, ``generate`` returns what it has (no token at all, if it was still reading: go on with the rest
    of the prompt).
    graph: decode with a ``Decoder`` while no row has ended, which replays the step from a CUDA graph where
    that is possible (on CUDA with backend "triton" or "cuda", without attention; never run on a GPU yet, hence on
    request); and ``read`` the prompt with ``graph``.
    guard: what is learned is taken back where it reads worse than the model's own weights; ``state.rollbacks``
    counts (see the model's ``forward``).
    Raises ValueError for an empty prompt, arguments out of range, and logits that are no distribution;
    TypeError for ids or a state of another kind. What is raised later leaves the given state at the last
    whole piece or token, its ``unread`` set.
    """
    op = "generate"
    options = Options(
        op=op, learn=learn, backend=backend, piece=piece, on_piece=on_piece, check_finite=check_finite,
        should_stop=should_stop, unread=unread, guard=guard, graph=graph,
    )
    check_callbacks(op, on_token=on_token)
    max_new_tokens = check_integer(op, "max_new_tokens", max_new_tokens, 1, "a positive integer")
    temperature = check_number(op, "temperature", temperature, lambda t: t >= 0, "a number >= 0")
    top_k = None if top_k is None else check_integer(op, "top_k", top_k, 1, "a positive integer or None")
    if top_p is not None:
        top_p = check_number(op, "top_p", top_p, lambda p: 0 < p <= 1, "a number in (0, 1] or None")
    seed = check_integer(op, "seed", seed, None, "an integer")
    stops = stop_sequences(model, stop) + end_tokens(model, eos_token_id)
    if stops and model.parallel is not None:
        model.parallel.check_stops(op)
    if ids is None:
        if isinstance(state, ModelState):
            state.settle()
        unread_ids: Tensor | None = getattr(state, "unread", None)
        if state is None or unread_ids is None or bool((unread_ids < 0).any()):
            raise ValueError(f"{op}: argument ids is None, which needs a state that generate returned")
        ids, unread = unread_ids, "included"
    text = opened(op, model, ids, state, lengths, unread)
    counts = text.lengths
    if isinstance(ids, Tensor) and counts is not None and min(counts, default=0) == 0:
        raise ValueError(f"{op}: empty prompt (ids has shape {list(ids.shape)}, lengths {counts}); every row needs "
                         "at least one token")
    logits, goes_on = None, state is not None and _goes_on(model, text, ids, state, options)
    if state is not None and goes_on:
        # the token that is read first is one of those that a run without a stop would have read in a step
        assert isinstance(ids, Tensor)
        B, device, finished = state.batch, ids.device, not options.stopped()
    else:
        reading = _read(model, text, state, options)
        logits, state, finished = reading.logits, reading.state, reading.finished
        B, device = state.batch, reading.nats.device
    if not finished:
        return Generation(torch.zeros(B, 0, dtype=torch.long, device=device), [0] * B, state, finished=False)
    if logits is None and not goes_on:
        raise ValueError("generate: empty prompt; every row needs at least one token")
    writing = Writing(B, stops, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    try:
        if logits is None:
            assert isinstance(ids, Tensor)
            writing.listen(state)
            decoder: Decoder | None = Decoder(model, state, learn, backend)
            logits = decoder.step(ids, check_finite)[:, 0]
            if on_piece is not None:
                on_piece(0, 0.0)
        else:
            decoder = None
            writing.hear(state.pos, logits.unsqueeze(1))
        for n in range(max_new_tokens):
            if writing.newest is not None:
                if options.stopped():
                    finished = False
                    break
                if n == 1 and decoder is None and (graph or _steps_in_cpp(model, options)):
                    decoder = Decoder(model, state, learn, backend)
                logits = _next(model, state, writing, decoder, logits, options, on_token is None)
            fresh = writing.write(state, logits)
            if on_token is not None:
                on_token(fresh)
            if all(writing.ended):
                break
    except BaseException:
        state.settle()
        writing.catch_up(state)
        raise
    rows, lengths_new = writing.rows, [len(r) for r in writing.rows]
    width = max(lengths_new)
    tokens = torch.tensor([r + [r[-1]] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    return Generation(tokens, lengths_new, state, finished)


def _next(
    model: Model, state: ModelState, writing: Writing, decoder: Decoder | None, before: Tensor, options: Options,
    alone: bool
) -> Tensor:
    """The logits [B, vocab] after the newest tokens; ``before`` of rows that have ended."""
    newest, ended = writing.newest, writing.ended
    assert newest is not None
    if decoder is not None:
        decoder.alone = alone and options.should_stop is None
    writing.listen(state)
    if decoder is not None and not any(ended):
        return decoder.step(newest, options.check_finite)[:, 0]
    out, _ = options.call(model, newest, state, [0 if e else 1 for e in ended])
    if not any(ended):
        return out[:, 0]
    keep = torch.tensor(ended, dtype=torch.bool, device=newest.device).unsqueeze(1)
    return torch.where(keep, before, out[:, 0])


def _goes_on(
    model: Model, text: Opened, ids: Tensor | Source, state: ModelState, options: Options
) -> bool:
    """Whether ``text`` is nothing but the tokens that ``state`` has not read, which a step in C++ may read."""
    if not isinstance(ids, Tensor) or ids.shape[1] != 1 or text.lead or set(text.lengths or [1]) != {1}:
        return False
    if state.unread is None or not torch.equal(ids, state.unread):
        return False
    guarded = options.learn == "off" or options.guard == (state.guard is not None)
    return guarded and _steps_in_cpp(model, options)


def _steps_in_cpp(model: Model, options: Options) -> bool:
    return native.unserved(model, options.backend, options.learn == "next_token" and model.learns) is None
