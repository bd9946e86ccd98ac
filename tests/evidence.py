"""Which kernels ran in tests that passed, and how: what docs/verified.md is made of (benchmarks/verified.py).

    HOPE_KERNELS_EVIDENCE=FOLDER python -m pytest ...     leaves FOLDER/<process>.json

A record is a list: how (interpreted, source, ptx, gpu), the architecture (0: none in particular),
family.kernel, dtype, and the number of tests.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def dtype_of(arguments) -> str:
    """The narrowest floating-point type among the tensors of a launch: what its products are computed in."""
    found = {t.dtype for t in tensors(arguments)}
    return next((name for dtype, name in NAMES.items() if dtype in found), "fp32")


def tensors(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


class Evidence:
    """A plugin of pytest. ``now``: what the running test launched; ``passed``: what tests that passed did."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.now: set[tuple] = set()
        self.passed: Counter[tuple] = Counter()

    def pytest_sessionstart(self):
        self.watch_triton()
        self.watch_cuda()

    def pytest_runtest_setup(self):
        self.now.clear()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.update(self.now)

    def pytest_sessionfinish(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        records = [[*what, count] for what, count in sorted(self.passed.items())]
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps(records))

    def watch_triton(self) -> None:
        try:
            from triton.runtime import driver
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction
        except ImportError:
            return

        def watched(kind, how):
            run = kind.run

            def noted(function, *args, **kwargs):
                family = function.fn.__module__.removeprefix("hope_kernels.ops.").split(".")[0]
                kernel = f"{family}.{function.fn.__name__}"
                self.now.add((*how(), kernel, dtype_of([*args, *kwargs.values()])))
                return run(function, *args, **kwargs)

            kind.run = noted

        watched(InterpretedFunction, lambda: ("interpreted", 0))
        how = "gpu" if torch.cuda.is_available() else "ptx"
        watched(JITFunction, lambda: (how, driver.active.get_current_target().arch))

    def watch_cuda(self) -> None:
        from hope_kernels.ops.titans import cuda
        from tools.ptx.cuda import SYMBOL, Driver

        scan, launch = cuda._scan, Driver.launch

        def noted_scan(config, w_init, inputs, *args):
            before = len(self.now)
            o = scan(config, w_init, inputs, *args)
            x = inputs.x
            if len(self.now) == before and not any(what[0] == "ptx" for what in self.now):
                how = ("gpu", 10 * torch.cuda.get_device_capability()[0]) if x.is_cuda else ("source", 0)
                for kernel in ("prefill", "decode")[:1 + (x.shape[1] == 1)]:
                    self.now.add((*how, f"cuda.titans_{kernel}<{x.shape[3]}>", NAMES[x.dtype]))
            return o

        def noted_launch(driver, what):
            launch(driver, what)
            kernel, width, dtype = SYMBOL.fullmatch(driver._symbols[what.kernel]).groups()
            self.now.add(("ptx", driver.arch, f"cuda.{kernel}<{width}>", dtype))

        cuda._scan, Driver.launch = noted_scan, noted_launch
