"""Every case of benchmarks.gpu, in the order of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks import bench_cms, bench_layers, bench_model, bench_titans, peers
from benchmarks import measure as m
from benchmarks.device import ceilings_of, describe, nvidia_smi

SECTIONS = ("env", "correctness", "ops", "layers", "model", "cms", "peers")
LONG_SECONDS = {"cuda": 60, "cpu": 15}  # then a long run stops by itself
Item = tuple[str, str, dict, Callable]

_P, _X, _C = bench_titans.P, bench_titans.X, bench_cms.X
_GRAPH = bench_titans.Case("step graph", T=1)
# What a run on a card is for, most important first, with the seconds that each case is expected to take there
# (an estimate: its check and its sets of inputs included, its kernels compiled).
WORTH = (
    ("ops", _P(), 6), ("ops", _X(), 5), ("ops", _P(N=64, B=4, T=8192), 5), ("ops", _X(N=64, B=4, T=8192), 5),
    ("ops", _P(C=16, N=64, B=4, T=8192), 5), ("ops", _X(C=16, N=64, B=4, T=8192), 5),
    ("ops", _GRAPH, 6), ("ops", replace(_GRAPH, backend="cuda"), 6),
    ("cms", bench_cms.R(1024, 64, **_C), 3), ("cms", bench_cms.R(4096, 64, **_C), 4),
    ("cms", bench_cms.R(4096, 4096, **_C), 5),
    ("layers", bench_layers.L(), 7), ("layers", bench_layers.LX(), 6),
    ("ops", bench_titans.Case("grad", T=8192), 14), ("model", bench_model.G("prefill", 8192), 15),
    ("model", bench_model.G("decode", 1000), 40), ("model", bench_model.G("prefill", 8192, "cuda"), 13),
    ("model", bench_model.G("decode", 1000, "cuda"), 40),
)
SECONDS = {case.name: seconds for _, case, seconds in WORTH}
# of the others, by kind or section
OTHERS = {"model": 15, "peers": 8, "compiled": 30, "forward": 20, "long": LONG_SECONDS["cuda"]}
USUALLY = 4


def seconds(section: str, name: str) -> float:
    """An estimate for a case on a card."""
    return SECONDS.get(name, OTHERS.get(name.partition(" ")[0], OTHERS.get(section, USUALLY)))


def parts(device: str, quick: bool) -> dict[str, list[Item]]:
    """(section, name, case as data, call with (ceilings) -> record) of every case, in the order of a run,
    correctness aside: "env", what a run is for ("worth"), "sweeps", and "peers" last."""
    env: list[Item] = [("env", "machine", {}, lambda _: describe(device))]
    for name in ceilings_of(device):
        env.append(("env", name, {}, lambda _, name=name: m.ceiling(name, device, quick)))
    if device == "cuda":
        env.append(("env", "after the matrix products", {}, lambda _: {"nvidia_smi": nvidia_smi()}))
    ops = [("ops", *item) for item in bench_titans.items(device, quick)]
    others = [("peers", *item) for item in peers.items(device, quick)]
    layers = [("layers", *item) for item in bench_layers.items(device, quick)]
    models = [("model", *item) for item in bench_model.items(device, quick, limit=LONG_SECONDS[device])]
    cms = [("cms", *item) for item in bench_cms.items(device, quick)]
    first = ((ops, bench_titans.FIRST), (layers, bench_layers.FIRST), (models, bench_model.FIRST),
             (cms, bench_cms.FIRST))
    ours = [item for items, n in first for item in items[:n]]
    ours += [item for items, n in first for item in items[n:]]
    worth = list(SECONDS) if device == "cuda" else []
    found = {item[1]: item for item in ours}
    return {"env": env, "worth": [found[name] for name in worth if name in found],
            "sweeps": [item for item in ours if item[1] not in worth], "peers": others}


def plan(device: str, quick: bool) -> Iterator[Item]:
    for items in parts(device, quick).values():
        yield from items


def names(device: str, quick: bool) -> dict[str, list[str]]:
    """The names of the cases, by section."""
    found: dict[str, list[str]] = {}
    for section, name, *_ in plan(device, quick):
        found.setdefault(section, []).append(name)
    return found
