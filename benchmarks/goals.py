"""The goals of this project, as data: a goal names the figure in the result files that decides it, and
the command that measures it.

A figure looks into one run: {file name without .json: contents}. Of a CUDA machine that is a folder written
by benchmarks.gpu, of the CPU the files of benchmarks/results itself. Both sides of a ratio come from one run
of one commit, or there is no figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

GPU = "python -m benchmarks.gpu"


class Missing(Exception):
    """Why a run has no figure for a goal."""


@dataclass(frozen=True)
class Found:
    """A figure and the records ((file, case name, record) each) that it follows from."""

    value: float
    sources: tuple[tuple[str, str, dict], ...]


def lookup(record: dict, path: str):
    """``record["a"]["b"]`` for "a.b"; None where it is not there."""
    for part in path.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


@dataclass(frozen=True)
class Key:
    """A number of the record whose name matches; of several, ``pick`` says which."""

    file: str
    name: str
    path: str = "ms.median"
    pick: Callable = max

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self,)

    def find(self, run: dict) -> Found:
        cases = run.get(self.file, {}).get("cases", {})
        matches = [(n, r) for n, r in cases.items() if fnmatchcase(n, self.name)]
        timed = [
            (lookup(r, self.path), n, r)
            for n, r in matches if r.get("status") == "ok" and lookup(r, self.path) is not None
        ]
        if not timed:
            raise Missing(
                "; ".join(f"{n}: {r.get('status')}, {str(r.get('reason', ''))[:80]}" for n, r in matches)
                or "no such case"
            )
        value, name, record = self.pick(timed, key=lambda t: t[0])
        return Found(value, ((self.file, name, record),))


@dataclass(frozen=True)
class Ratio:
    """``over`` / ``under``."""

    over: Key
    under: Key

    @property
    def keys(self) -> tuple[Key, ...]:
        return self.over, self.under

    def find(self, run: dict) -> Found:
        a, b = self.over.find(run), self.under.find(run)
        marks = [
            tuple(run[key.file]["stamp"].get(k) for k in ("commit", "source", "quick", "dirty"))
            for key in self.keys
        ]
        if marks[0] != marks[1]:
            raise Missing(f"{self.over.file}.json and {self.under.file}.json are of different code")
        return Found(a.value / b.value, a.sources + b.sources)


@dataclass(frozen=True)
class Computed:
    """Whatever a small function makes of one file; it raises Missing, or KeyError for what is not there."""

    file: str
    name: str
    function: Callable[[dict], tuple[float, dict]]

    @property
    def keys(self) -> tuple[Key, ...]:
        return (Key(self.file, self.name),)

    def find(self, run: dict) -> Found:
        if self.file not in run:
            raise Missing("no such file")
        try:
            value, record = self.function(run[self.file])
        except KeyError as e:
            raise Missing(f"no {e}") from None
        return Found(value, ((self.file, self.name, record),))


@dataclass(frozen=True)
class Goal:
    """``better`` is ">=" or "<="; unit "%", "x" (times), "s" or "us"."""

    what: str
    better: str
    target: float
    unit: str
    figure: Key | Ratio | Computed
    command: str = GPU
    on: str = "gpu"

    def met(self, value: float) -> bool:
        return value >= self.target if self.better == ">=" else value <= self.target

    def verdict(self, value: float) -> str:
        """"met", or by what factor it was missed."""
        if self.met(value):
            return "met"
        large, small = (self.target, value) if self.better == ">=" else (value, self.target)
        return f"missed by {large / small:.2f}x" if small > 0 else f"missed by {abs(large - small):g}"

    def text(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.0%}" if value == self.target else f"{value:.1%}"
        shown = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{shown} {self.unit}" if self.unit in ("s", "us") else shown + self.unit


def prefill(shape: str, backend: str, path: str = "ms.median", pick: Callable = max) -> Key:
    return Key("ops", f"prefill {shape} {backend}", path, pick)


def peer(kind: str, shape: str) -> Key:
    return Key("peers", f"{kind} {shape}")


def one(cases: list[dict], dim: int, chunk: int) -> dict:
    found = [c for c in cases if (c["dim"], c["chunk"]) == (dim, chunk)]
    if not found:
        raise Missing(f"no case d = {dim}, chunk {chunk}")
    return found[0]


def package_on_cpu(data: dict) -> tuple[float, dict]:
    ratios = [one(data["cases"], d, c)["ratio"]["median"] for d, c in ((256, 64), (64, 16))]
    return math.prod(ratios) ** (1 / len(ratios)), data


def drop_in_on_cpu(data: dict) -> tuple[float, dict]:
    if "geometric_mean_drop_in" not in data:
        raise Missing("measured before there was such a case")
    return data["geometric_mean_drop_in"], data


def default_chunks_on_cpu(data: dict) -> tuple[float, dict]:
    if "default_chunks" not in data:
        raise Missing("measured before there was such a case")
    return data["default_chunks"]["ratio_drop_in"]["median"], data


def ceiling_on_cpu(data: dict) -> tuple[float, dict]:
    """The lowest share at d = 256, of both layers."""
    cases = [c for c in data["cases"] if c["dim"] == 256]
    if not cases:
        raise Missing("no case d = 256")
    return min(c[key]["median"] for c in cases for key in ("of_fma", "of_fma_default")), data


def learning_on_cpu(data: dict, what: str) -> tuple[float, dict]:
    found = next(c for c in data["cases"] if (c["B"], c["how"]) == (1, "learning"))
    return found[what]["median"], data


def decode_on_cpu(data: dict) -> tuple[float, dict]:
    found = next(c for c in data["cases"] if (c["B"], c["learn"], c["how"]) == (1, "off", "greedy"))
    return found["us"]["median"], data


def train_on_cpu(data: dict) -> tuple[float, dict]:
    found = next(c for c in data["cases"] if c["backend"] == "cpp")
    return found["us"]["step"]["median"], data


def failures(data: dict) -> tuple[float, dict]:
    """Tests that did not end well, of tests that ran at all, without what sums up those of a backend."""
    cases = data["cases"].values()
    counted = [r["status"] for r in cases if r["status"] != "skipped" and "not run" not in r]
    if not any(status == "passed" for status in counted):
        raise Missing("no test ran")
    return float(sum(status in ("failed", "died") for status in counted)), {}


def flat_decode(data: dict) -> tuple[float, dict]:
    """A token after ten million others against one after a thousand."""
    for record in data["cases"].values():
        spans = record.get("decode_ms")
        if record.get("status") == "ok" and isinstance(
            spans, list
        ) and spans[-1]["after"] >= 10_000_000 and spans[0]["after"] <= 1000:
            return spans[-1]["p50"] / spans[0]["p50"], record
    raise Missing("no run of 10,000,000 tokens")


WIDE, NARROW = "C64 D64 N256 H32 B1 T32768 bf16", "C64 D64 N64 H32 B4 T8192 bf16"
LONG_CHUNK = "C1024 D64 N256 H32 B1 T32768 bf16"
BEST_RECALL, MANY = "C16 D64 N64 H32 B4 T8192 bf16", "C256 D64 N256 H32 B4 T8192 bf16"
BILLION = "long 1.3B B1 T1000000 *"
CPU, READING = "python -m benchmarks.bench_cpu", "python -m benchmarks.bench_reading"
GOALS = (
    Goal("tests of the kernels on the device that fail", "<=", 0, "", Computed("correctness", "*", failures)),
    Goal("prefill, N = 256, C = 64: CUDA C++, of the GEMM rate", ">=", 0.40, "%",
        prefill(WIDE, "cuda", "of_matmul")),
    Goal("prefill, N = 256, C = 64: Triton, of the GEMM rate", ">=", 0.12, "%",
        prefill(WIDE, "triton", "of_matmul")),
    Goal("prefill, N = 256, C = 256, B H = 128: the faster backend, of the GEMM rate", ">=", 0.60, "%",
        prefill(MANY, "*", "of_matmul")),
    Goal("prefill, N = 64, C = 64, B H = 128: CUDA C++, time of FLA's gated delta rule", "<=", 1.0, "x",
         Ratio(prefill(NARROW, "cuda"), peer("fla", NARROW))),
    Goal("prefill, N = 64, C = 64, B H = 128: Triton, time of FLA's gated delta rule", "<=", 1.5, "x",
         Ratio(prefill(NARROW, "triton"), peer("fla", NARROW))),
    Goal("prefill, N = 64, C = 16, B H = 128: the faster backend, of the GEMM rate", ">=", 0.15, "%",
         prefill(BEST_RECALL, "*", "of_matmul")),
    Goal("prefill, N = 64, C = 16, B H = 128: the faster backend, time of FLA's gated delta rule", "<=", 2.0, "x",
         Ratio(prefill(BEST_RECALL, "*", pick=min), peer("fla", NARROW))),
    Goal("prefill, N = 256, C = 64, width 2048: CUDA C++, time of FLA's gated delta rule", "<=", 4.0, "x",
         Ratio(prefill(WIDE, "cuda"), peer("fla", WIDE))),
    Goal("whole layer, N = 256, C = 64, width 2048: time of FLA's layer", "<=", 1.6, "x",
         Ratio(Key("layers", f"layer {WIDE} *", pick=min), Key("layers", f"fla layer {WIDE}*"))),
    Goal("prefill, N = 256, C = 64: speed against the compiled chunked backend in a CUDA graph", ">=", 10.0, "x",
         Ratio(peer("compiled", WIDE), prefill(WIDE, "*", pick=min))),
    Goal("prefill, N = 256, C = 1024: speed against the compiled chunked backend in a CUDA graph", ">=", 2.0, "x",
         Ratio(peer("compiled", LONG_CHUNK), prefill(LONG_CHUNK, "*", pick=min))),
    Goal("layer on the GPU: speed against nested-learning 0.2.0, least of all shapes", ">=", 1000.0, "x",
         Key("peers", "package *", "ratio_long", min)),
    Goal("decode step, batch 1, in a CUDA graph: the faster backend, of the copy rate", ">=", 0.75, "%",
         Key("ops", "step graph C64 D64 N256 H32 B1 T1 bf16 *", "plain.of_copy")),
    Goal("decoded token after 10,000,000 tokens, against one after 1000", "<=", 1.01, "x",
         Computed("model", "long * T10000000 *", flat_decode)),
    Goal("CMS refresh, C = 64 (bound by bytes), d = 4096: of the copy rate", ">=", 0.85, "%",
         Key("cms", "refresh d4096 C64 B1 bf16 gd*", "of_copy", max)),
    Goal("CMS refresh, C = 4096 (bound by products), d = 4096: of the GEMM rate", ">=", 0.80, "%",
         Key("cms", "refresh d4096 C4096 B1 bf16 gd*", "of_matmul", max)),
    Goal("gradient, N = 256, C = 64: Triton, backward per forward", "<=", 3.0, "x",
         Key("ops", "grad C64 D64 N256 H32 B1 T8192 bf16 triton", "backward_per_forward")),
    Goal("a 1.3B model reads 1,000,000 tokens with learning", "<=", 20.0, "s",
        Key("model", BILLION, "read_seconds")),
    Goal("the same, peak memory of the last tenth against the first", "<=", 1.01, "x",
         Ratio(Key("model", BILLION, "peak_mib_last"), Key("model", BILLION, "peak_mib_first"))),
    Goal("layer on the CPU: speed against nested-learning 0.2.0, geometric mean of two shapes", ">=", 150.0, "x",
         Computed("cpu", "d = 256, C = 64; d = 64, C = 16", package_on_cpu), CPU, "cpu"),
    Goal("drop-in class on the CPU: speed against nested-learning 0.2.0, geometric mean of three shapes", ">=",
         100.0, "x", Computed("cpu", "d = 64, C = 16; d = 256, C = 16 and 64", drop_in_on_cpu), CPU, "cpu"),
    Goal("the same with that package's default chunks of one token, d = 64", ">=", 20.0, "x",
         Computed("cpu", "d = 64, C = 1", default_chunks_on_cpu), CPU, "cpu"),
    Goal("layer on the CPU, d = 256: of a loop of fused multiply-adds, least of all cases", ">=", 0.55, "%",
         Computed("cpu", "d = 256", ceiling_on_cpu), CPU, "cpu"),
    Goal("reading with learning on the CPU, bundled model: time of reading without", "<=", 2.2, "x",
         Computed("reading", "B = 1", lambda data: learning_on_cpu(data, "over off")), READING, "cpu"),
    Goal("the same, a token", "<=", 45.0, "us",
         Computed("reading", "B = 1", lambda data: learning_on_cpu(data, "us")), READING, "cpu"),
    Goal("decoding on the CPU, bundled model, one row, greedy: a token of generate", "<=", 150.0, "us",
         Computed("decode", "B = 1", decode_on_cpu), "python -m benchmarks.bench_decode", "cpu"),
    Goal("training on the CPU, model of examples/train_lm.py: a token", "<=", 150.0, "us",
         Computed("train", "cpp", train_on_cpu), "python -m benchmarks.bench_train", "cpu"),
)


def unplanned(goal: Goal, plan: dict[str, list[str]]) -> Iterator[str]:
    """Cases of a goal for a CUDA machine that no section of benchmarks.gpu has. plan: {section: case names}."""
    for key in goal.figure.keys if goal.on == "gpu" else ():
        if key.file != "correctness" and not any(fnmatchcase(name, key.name) for name in plan.get(key.file, ())):
            yield f"{key.file}: {key.name}"
