"""What ``torch.compile`` follows of a model, and what it runs as it is."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..layers.wrapped import placement
from ..model_state import MixerState, ModelState
from ..ops.cms import backends as cms
from ..ops.cms import cpp as compiled
from ..ops.titans.backends import DEVICE_DECIDES, resolve
from ..ops.titans.scan import titans_chunk
from ..state import Counters
from .protocol import Model
from .wavefront import chunk_of

REASON = ("a call that learns, runs on a compiled or NumPy backend, or goes on inside a chunk is not traced: its "
          "schedule follows counters on the host; see hope_kernels/engine/compiling.py")


def traced(model: Model, ids: Tensor, state: ModelState | None, learn: str, backend: str | None) -> bool:
    """Whether the compiler may follow a call of ``model``; decided while it does.

    PyTorch's own backend unrolls the chunks of a call at the positions of the rows: a graph for every phase
    of an open chunk, tens of seconds each. So it is followed from nothing and from states that stand at a
    boundary of all periods with nothing learned, where one graph serves all positions; any other call, and
    what ctypes and NumPy compute, runs without the compiler. The kernels of ``DEVICE_DECIDES`` go by counters
    on the device and are followed anywhere.
    """
    config, dtype, device = model.config, placement(model.embed).dtype, ids.device
    if learn == "next_token" and model.learns:
        return False
    if backend in DEVICE_DECIDES:
        return True
    titans = None if config.mixer == "attention" else config.titans
    if titans is not None and resolve(titans, dtype, device, backend) is not titans_chunk:
        return False
    if any([c is not None and cms.resolve(c, dtype, device, backend) is compiled for c in config.block_cms]):
        return False
    return state is None or (config.mixer != "attention" and _at_a_boundary(model, state))


def _at_a_boundary(model: Model, state: ModelState) -> bool:
    chunk, segment = chunk_of(model.config), model.segment or 1
    for c in state.cms:
        if c is not None and any([held is not None for held in (*c.weights, *c.left)]):
            return False
    # one sum, one guard: whichever row it is that stands elsewhere
    return sum([p % chunk + p % segment + s * s for p, s in zip(state.pos, state.seen)]) == 0


def run_traced(
    model: Model, h: Tensor, state: ModelState, lengths: list[int], backend: str | None
) -> tuple[Tensor, list[MixerState]]:
    """``model.run`` in a call that ``traced`` has let pass. At a boundary only the results' counters know
    where the rows stand: from 0 the compiler unrolls chunks at constant places, where symbolic ones cost it
    several times as long."""
    mixers = state.mixers
    if backend in DEVICE_DECIDES or model.config.mixer == "attention":
        return model.run(h, mixers, state.cms, lengths, backend)
    h, new = model.run(h, [replace(m, pos=Counters([0] * m.batch)) for m in mixers], state.cms, lengths, backend)
    return h, [replace(m, pos=Counters([p + n for p, n in zip(old.pos, lengths)])) for m, old in zip(new, mixers)]
