"""Calls that an interrupt cuts short: an exception at a chosen step of the interpreter, as of a signal handler."""

import sys
from collections.abc import Callable
from pathlib import Path

import hope_kernels

HERE = str(Path(hope_kernels.__file__).parent)


class Interrupt(BaseException):
    pass


class CutShort:
    """Calls functions and raises ``Interrupt`` before the n-th opcode that they execute in files of the package. error:
    what was raised last, with the frames it came through, as an interactive session keeps it."""

    def __init__(self) -> None:
        self.executed, self.error = 0, None

    def __call__(self, call: Callable[[], object], at: int = 0) -> bool:
        """Whether ``call`` was cut short; ``executed`` counts its opcodes."""
        self.executed = 0

        def trace(frame, event, _):
            if not frame.f_code.co_filename.startswith(HERE):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if event == "opcode":
                self.executed += 1
                if self.executed == at:
                    raise Interrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        except Interrupt as error:
            self.error = error
            return True
        finally:
            sys.settrace(before)
        return False
