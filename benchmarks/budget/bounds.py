"""From counts to bounds and a predicted time. Every constant is an assumption with its source; none was
measured by this repository, and a prediction is not a measurement.

    issue     warp instructions (SASS), one a scheduler and cycle, four schedulers a multiprocessor
    tensor    FLOPs of mma.sync and wgmma at their rates
    shared    wavefronts of shared memory, one a cycle and multiprocessor (without what wgmma reads itself)
    L2        bytes of global memory that lanes ask for, each once an instruction, as if nothing hit in L1
              (and as if every sector of 32 bytes were used up: by sectors it is more)
    L1        the same at 128 bytes a cycle and multiprocessor, for kernels that read again what they have
              just read
    memory    bytes that the call cannot avoid to move
    warp      what a warp needs that has its scheduler for itself: stalls and scoreboards of its SASS
              (sass.by_stage), shared by as many warps as are resident
    chain     where work waits for work: the same, along the stages of a chunk and what is handed on between
              them, times the chunks of a (row, head), and of all that come before it where not all fit at once
    host      launches of Triton's kernels by the host, where no CUDA graph makes them
    GEMM      products that PyTorch's library does, at its rate

A prediction is the largest of these and, added to it, what nothing hides: latencies of launches and of
barriers between blocks, and what PyTorch moves in passes of its own. It lies low: warps that wait for each other
or for one unit at once take longer than each alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.budget.cases import Size


@dataclass(frozen=True)
class Assumption:
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Machine:
    name: str
    of: Mapping[str, Assumption]

    def __getitem__(self, name: str) -> float:
        return self.of[name].value


_LAUNCH = Assumption(
    1.5e-6, "s", "from the end of a kernel to the start of the next in a CUDA graph: taken, not looked up"
)
_CLUSTER = Assumption(
    200, "cycles", "a barrier of a cluster or of blocks through L2: taken, between the latencies of "
    "distributed shared memory and of L2 (Luo et al., arXiv 2501.12084: some 180 and 260 cycles)"
)
_HANDOFF = Assumption(
    700, "cycles", "from a task's last store to another's first load: two round trips to L2, two barriers; "
    "taken"
)
_HOST = Assumption(25e-6, "s", "of the host, for a launch of a Triton kernel with groups of arguments: taken")
MACHINES = {
    90: Machine("H200 SXM", {
        "multiprocessors": Assumption(132, "", "H100 whitepaper (SXM5; the same chip)"),
        "clock": Assumption(1.755e9, "Hz", "boost clock of an H100 PCIe (chipsandcheese.com, 2 July 2023); "
                            "an SXM card may run at up to 1.98 GHz"),
        "issue": Assumption(4, "warp instructions a cycle", "H100 whitepaper: four schedulers"),
        "wgmma": Assumption(4096, "FLOP a cycle", "H100 whitepaper: 989.4 TFLOP/s bf16, dense"),
        "mma": Assumption(2560, "FLOP a cycle", "63% of wgmma: Luo et al., arXiv 2402.13499"),
        "shared": Assumption(1, "wavefronts of 128 bytes a cycle",
                             "CUDA C++ Programming Guide: 32 banks of 4 bytes"),
        "L2": Assumption(5.5e12, "B/s", "read by chipsandcheese.com, 2 July 2023 (H100 PCIe)"),
        "memory": Assumption(4.3e12, "B/s", "copies on an H200, read and written; of 4.8e12 (data sheet)"),
        "GEMM": Assumption(790e12, "FLOP/s", "torch.matmul in bf16 on an H200; of 989e12 (data sheet)"),
        "FLA": Assumption(1.241e-3, "s", "FLA's gated delta rule (Triton), width 2048, 32,768 tokens, on an "
                          "H200: told, not in benchmarks/results"),
        "registers": Assumption(65536, "a multiprocessor", "H100 whitepaper"),
        "launch": _LAUNCH, "cluster": _CLUSTER, "handoff": _HANDOFF, "host": _HOST,
    }),
    80: Machine("A100 SXM 80 GB", {
        "multiprocessors": Assumption(108, "", "A100 whitepaper"),
        "clock": Assumption(1.41e9, "Hz", "A100 whitepaper: boost clock"),
        "issue": Assumption(4, "warp instructions a cycle", "A100 whitepaper: four schedulers"),
        "wgmma": Assumption(2048, "FLOP a cycle", "there is none"),
        "mma": Assumption(2048, "FLOP a cycle", "A100 whitepaper: 312 TFLOP/s bf16, dense"),
        "shared": Assumption(1, "wavefronts of 128 bytes a cycle", "CUDA C++ Programming Guide"),
        "L2": Assumption(4.5e12, "B/s", "A100 whitepaper: 5120 bytes a cycle, 7.2e12 B/s; two thirds taken"),
        "memory": Assumption(1.75e12, "B/s", "A100 whitepaper: 2.04e12 B/s; 86% taken"),
        "GEMM": Assumption(250e12, "FLOP/s", "80% of 312 TFLOP/s, taken"),
        "registers": Assumption(65536, "a multiprocessor", "A100 whitepaper"),
        "launch": _LAUNCH, "cluster": _CLUSTER, "handoff": _HANDOFF, "host": _HOST,
    }),
}


@dataclass(frozen=True)
class Costs:
    """Of a unit of work, all of its warps together. instructions: as issued; warp: cycles of all warps, each
    alone; chain: cycles from a unit's start to its end along its stages, if it had the machine for itself;
    launches: for a unit."""

    instructions: float
    mma: float
    wgmma: float
    wavefronts: float
    l2_bytes: float
    warp: float
    chain: float = 0
    launches: float = 0


@dataclass(frozen=True)
class Prediction:
    """Milliseconds. bounds: by name; added: latencies that nothing hides."""

    bounds: dict[str, float]
    added: dict[str, float]

    @property
    def limit(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def ms(self) -> float:
        return max(self.bounds.values()) + sum(self.added.values())


def predict(c: Costs, size: Size, machine: Machine) -> Prediction:
    """Of the whole call. Persistent kernels spread over all multiprocessors; of others, a chain has
    ``blocks`` of them for itself, and chains that do not fit wait for those before them."""
    sms, cycle = machine["multiprocessors"], 1 / machine["clock"]
    per_chain = size.units / size.chains  # one after the other
    waves = 1
    if size.persistent:
        each, together = size.units / sms, sms * size.resident * size.warps
        warp = size.units * c.warp / together
    else:
        at_once = min(size.chains, sms * size.resident // size.blocks)
        waves = math.ceil(size.chains / at_once)
        each = per_chain * waves * math.ceil(at_once * size.blocks / sms) / size.blocks
        warp = per_chain * waves * c.warp / (size.blocks * size.warps)
    cycles = {
        "issue": each * c.instructions / machine["issue"],
        "tensor": each * (c.mma / machine["mma"] + c.wgmma / machine["wgmma"]),
        "shared": each * c.wavefronts / machine["shared"],
        "warp": warp,
        "chain": per_chain * waves * c.chain,
    }
    bounds = {name: 1e3 * cycle * n for name, n in cycles.items()}
    if size.reuse:
        bounds["L1"] = 1e3 * cycle * each * c.l2_bytes / (128 * machine["shared"])
    else:
        bounds["L2"] = 1e3 * size.units * c.l2_bytes / machine["L2"]
    bounds["memory"] = 1e3 * size.bytes / machine["memory"]
    if c.launches and not size.recorded:
        bounds["host"] = 1e3 * per_chain * c.launches * machine["host"]
    if size.library:
        bounds["GEMM"] = 1e3 * size.library / machine["GEMM"]
    latency = machine["handoff" if size.persistent or size.exchange else "cluster"]
    launches = per_chain * c.launches if size.recorded else size.launches
    added = {
        "launches": 1e3 * launches * machine["launch"],
        "barriers": 1e3 * cycle * per_chain * size.barriers * latency,
    }
    if size.exchange:
        bounds["chain"] += waves * added.pop("barriers")
    if size.passes:
        added["passes"] = 1e3 * size.passes / machine["memory"]
    if size.persistent:  # other chains fill the time that one waits
        bounds["chain"] += added.pop("barriers")
    if size.memory_first:  # the first result follows the last byte
        added["warp"] = bounds.pop("warp")
    return Prediction({n: v for n, v in bounds.items() if v}, {n: v for n, v in added.items() if v})
