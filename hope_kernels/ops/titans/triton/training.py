"""backend="triton" where gradients are on: the forward kernels span by span, and a backward that keeps one
state a span.

A span is ``CHUNKS_A_SPAN`` chunks of the faster clock, or one of the slower if that is longer; all spans
start at a boundary of both clocks (the first one inside the open chunk of each row). The forward is the one
that serves no_grad, cut at the spans; a cut changes no bit of it. Kept: the state at the start of every span.
The backward goes through the spans from the last one, recomputes each from its state, and hands the adjoint
of the state on to the span before:

    memory   tokens / span x state, beside inputs and outputs (plain autograd: every activation and every
             chunk's state)
    work     the forward twice, and the backward

``recompute_span`` differentiates the span as the chunked backend computes it.
``backward.span_adjoint`` does it in kernels, for the configurations they serve; on a GPU from a recorded CUDA
graph (``span_graphs.py``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....config import TitansConfig
from ....state import Counters, master_dtype
from ..inputs import TokenInputs
from ..scan import titans_chunk
from ..state import FastWeights, TitansState, on_device
from . import backward as triton_backward
from . import span_graphs
from .operator import titans_triton
from .spans import CARRIED, TOKENS, Call, Span


def titans_triton_training(
    config: TitansConfig, w_init: FastWeights, inputs: TokenInputs, state: TitansState, lengths: list[int],
    *, update: bool = True, constant_memory: bool = False, stats=None,
) -> tuple[Tensor, TitansState]:
    """As ``scan.titans_chunk`` under grad: o and the new state carry the graph to whatever required a
    gradient.

    ``constant_memory``: the graph runs through q only, and the new state is detached. Raises ValueError for
    ``stats``. Gradients of gradients are not there.
    """
    if stats is not None:
        raise ValueError("titans: backend 'triton' collects no statistics; the chunked backend does")
    if constant_memory:
        w_init, state = w_init.map(Tensor.detach), state.constant()
        alive = "x" if config.adaptive_q else "q"
        inputs = TokenInputs(
            *(t if t is None or n == alive else t.detach() for n, t in zip(inputs._fields, inputs))
        )
    carried = [getattr(state, n) for n in CARRIED]
    tensors = [*w_init, *inputs, *carried]
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        with torch.no_grad():
            return titans_triton(config, w_init, inputs, state, lengths, update=update)
    # the caller may advance its state in place before the backward
    bare = replace(
        state, pos=Counters(state.pos), count=state.count.clone(), conv_tail=None, **dict.fromkeys(CARRIED)
    )
    call = Call(config, bare, list(lengths), on_device(lengths, state.count.device), update, constant_memory)
    o, *new = _Training.apply(call, *tensors)
    if not update:
        return o, state
    return o, state.advanced(lengths, count=state.count + call.reads, **dict(zip(CARRIED, new)))


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *tensors: Tensor | None):
        w_init, inputs, carried = FastWeights(*tensors[:3]), TokenInputs(*tensors[3:12]), tensors[12:]
        first = inputs.x if inputs.x is not None else inputs.k
        o = torch.zeros_like(first)
        kept, spans = [], call.spans()
        for span in spans:
            kept.append(carried)
            part, state = titans_triton(
                call.config, w_init, span.take_inputs(inputs), call.at(span, carried), span.counts,
                update=call.update, reads=span.reads)
            span.put(o, part)
            carried = tuple(getattr(state, n) for n in CARRIED)
        ctx.call, ctx.spans = call, spans
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(t for state in kept[1:] for t in state))
        new = carried if call.update else [None] * len(CARRIED)
        if call.constant_memory:
            ctx.mark_non_differentiable(*(t for t in new if t is not None))
        return o, *new

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor | None, *dnew: Tensor | None):
        call, saved = ctx.call, ctx.saved_tensors
        w_init, inputs = FastWeights(*saved[:3]), TokenInputs(*saved[3:12])
        master = master_dtype(inputs.q.dtype if inputs.x is None else inputs.x.dtype)
        size, needed = len(CARRIED), ctx.needs_input_grad[1:]
        adjoint = dict(zip(CARRIED, dnew))
        names, given = FastWeights._fields + TokenInputs._fields, (*w_init, *inputs)
        totals: list[Tensor | None] = [None] * len(given)
        for index, span in reversed(list(enumerate(ctx.spans))):
            state = call.at(span, saved[12 + index * size : 12 + (index + 1) * size])
            error = None if do is None else span.take(do)
            back = span_graphs.span_adjoint if triton_backward.serves(call.config) else recompute_span
            found, adjoint = back(call, w_init, span.take_inputs(inputs), state, span, error, adjoint, needed[:12])
            for j, part in enumerate(found):
                if part is None or not needed[j]:
                    continue
                if totals[j] is None:
                    totals[j] = torch.zeros_like(given[j], dtype=given[j].dtype if names[j] in TOKENS else master)
                span.put(totals[j], part) if names[j] in TOKENS else totals[j].add_(part)
        carried = [adjoint[n] if want else None for n, want in zip(CARRIED, needed[12:])]
        return None, *(None if g is None else g.to(t.dtype) for g, t in zip([*totals, *carried], saved))


def recompute_span(
    call: Call, w_init: FastWeights, inputs: TokenInputs, state: TitansState, span: Span, do: Tensor | None,
    adjoint: dict[str, Tensor | None], needed: tuple[bool, ...],
) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
    """Gradients of one span by autograd through the chunked backend.

    do [B, n, H, D] and ``adjoint`` (of the state after the span): None where zero. needed: of w_init's and
    the inputs' tensors. Returns the gradients of w_init's (fp32, or fp64) and the inputs' tensors, and the
    adjoint of the state before the span.
    """
    w_init = w_init.map(lambda t: t.to(state.delta2.dtype))

    def leaf(t: Tensor | None, wanted: bool) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_(wanted)

    with torch.enable_grad():
        given = [leaf(t, wanted) for t, wanted in zip((*w_init, *inputs), needed)]
        carried = [leaf(getattr(state, n), not call.constant_memory) for n in CARRIED]
        o, new = titans_chunk(
            call.config, FastWeights(*given[:3]), TokenInputs(*given[3:]),
            replace(state, **dict(zip(CARRIED, carried))), span.counts,
            update=call.update, constant_memory=call.constant_memory)
        if do is not None and not span.even:
            read = torch.arange(o.shape[1], device=o.device) < span.reads.unsqueeze(1)
            # what follows a row's tokens has no meaning, and no gradient
            o = torch.where(read[..., None, None], o, 0.0)
        ends = [(o, do), *((getattr(new, n), adjoint[n]) for n in CARRIED)]
        ends = [(t, g) for t, g in ends if g is not None and t is not None and t.requires_grad]
        leaves = [t for t in (*given, *carried) if t is not None and t.requires_grad]
        grads = (
            torch.autograd.grad([t for t, _ in ends], leaves, [g.to(t.dtype) for t, g in ends],
                allow_unused=True) if ends else ()
        )
    by_leaf = {id(t): g for t, g in zip(leaves, grads)}
    return [by_leaf.get(id(t)) for t in given], {n: by_leaf.get(id(t)) for n, t in zip(CARRIED, carried)}
