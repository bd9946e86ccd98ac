"""A CUDA graph on tensors of the CPU: every operator that PyTorch dispatches, and every launch of an
interpreted Triton kernel, is kept with the tensors it was given, and done again on these.

As a capture does, recording changes nothing (what was written is put back), refuses what would wait for the
device or bring a value from the host, and keeps whatever Python decided meanwhile.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None

# what a value is read back by, and tensors that are made from Python's numbers
REFUSED = (
    "_local_scalar_dense", "nonzero", "lift_fresh", "lift", "equal", "is_nonzero", "masked_select",
    "_unique2", "unique_consecutive", "unique_dim", "repeat_interleave", "bincount",
)


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def where(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


class EmulatedRecorder:
    """Records as ``hope_kernels.recorder.Recorder`` says. parts: of each recording, how often each operator is in
    it."""

    def __init__(self):
        self.parts: list[Counter] = []

    def record(self, parts):
        tape = _Tape()
        try:
            done = [tape.part(part) for part in parts]
        finally:
            tape.put_back()
        self.parts += [Counter(name for name, _ in steps) for steps in done]
        return [lambda steps=steps: again(steps) for steps in done]


@torch.no_grad()
def again(steps) -> None:
    for _, step in steps:
        step()


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps: list = []
        self.made: set[int] = set()  # storages that the recording has made
        self.alive: list = []  # so that no other tensor gets their addresses
        self.before: dict[int, tuple] = {}
        self.inside = False  # an operator, whose launches are its own matter

    def part(self, work) -> list:
        self.steps = []
        run = interpreter and interpreter.InterpretedFunction.run
        if run:
            tape = self

            def launch(kernel, *args, grid, warmup, **kwargs):
                again = lambda: run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
                tape.launched(again, kernel, args, kwargs)

            interpreter.InterpretedFunction.run = launch
        try:
            with self:
                work()
        finally:
            if run:
                interpreter.InterpretedFunction.run = run
        return self.steps

    def launched(self, again, kernel, args, kwargs) -> None:
        if self.inside:
            return again()
        with _disable_current_modes():
            for t in tensors_in([args, kwargs]):
                self.keep(t)
            again()
        self.steps.append((f"launch {kernel.__name__}", again))

    def keep(self, t: torch.Tensor) -> None:
        """What t holds, if the recording has not made it."""
        if t.numel() and where(t) not in self.made and where(t) not in self.before:
            storage = t.untyped_storage()
            self.before[where(t)] = storage, storage.clone()

    def put_back(self) -> None:
        for storage, held in self.before.values():
            storage.copy_(held)
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name in REFUSED:
            raise RuntimeError(f"{func} while recording: it waits for the device, or for the host")
        written = [
            value for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write
            for value in tensors_in(args[i] if i < len(args) else kwargs.get(a.name))
        ]
        for t in written:
            self.keep(t)
        self.inside = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = False
        self.alive.append((args, kwargs, out))
        views = any(r.alias_info is not None for r in func._schema.returns)
        if not views:
            self.made.update(where(t) for t in tensors_in(out))
        results = [] if views else tensors_in(out)

        def again():
            # a view is where it was; the others write into the memory that they had
            if written or not views:
                found = tensors_in(func(*args, **kwargs))
                for t, new in zip(results, found, strict=bool(results)):
                    if t.data_ptr() != new.data_ptr():
                        t.copy_(new)

        self.steps.append((str(func), again))
        return out
