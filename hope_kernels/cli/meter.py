"""Peak memory of this process over stretches of a run: resident set on the CPU, allocated tensors on a CUDA
device."""

from __future__ import annotations

import threading
import time

import torch


def resident_bytes() -> int:
    """Resident set size now, in bytes (0 where /proc is missing)."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except OSError:
        return 0


class PeakMemory:
    """``with PeakMemory() as peak: ...; peak.take()`` gives the highest use since the last take, in bytes."""

    def __init__(self, device: torch.device | str = "cpu", interval: float = 0.02):
        self.cuda = torch.device(device).type == "cuda"
        self.interval, self.highest, self._stop = interval, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.highest = max(self.highest, resident_bytes())
            time.sleep(self.interval)

    def take(self) -> int:
        if self.cuda:
            value = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return value
        value, self.highest = max(self.highest, resident_bytes()), 0
        return value

    def __enter__(self) -> PeakMemory:
        if not self.cuda:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()


def megabytes(n: int) -> str:
    return f"{n / 2**20:.0f} MB"
