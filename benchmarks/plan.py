"""Every case of benchmarks.gpu, in the order of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks import bench_cms, bench_layers, bench_model, bench_titans, peers
from benchmarks import measure as m
from benchmarks.device import ceilings_of, describe, nvidia_smi

SECTIONS = ("env", "correctness", "ops", "layers", "model", "cms", "peers")
LONG_SECONDS = {"cuda": 90, "cpu": 15}  # then a long run stops by itself


def plan(device: str, quick: bool) -> Iterator[tuple[str, str, dict, Callable]]:
    """(section, name, case as data, call with (ceilings) -> record): the order of a run, correctness aside;
    the most important rows of ours and of the peers, then the sweeps."""
    yield "env", "machine", {}, lambda _: describe(device)
    for name in ceilings_of(device):
        yield "env", name, {}, lambda _, name=name: m.ceiling(name, device, quick)
    if device == "cuda":
        yield "env", "after the matrix products", {}, lambda _: {"nvidia_smi": nvidia_smi()}
    ops = [("ops", *item) for item in bench_titans.items(device, quick)]
    others = [("peers", *item) for item in peers.items(device, quick)]
    layers = [("layers", *item) for item in bench_layers.items(device, quick)]
    models = [("model", *item) for item in bench_model.items(device, quick, limit=LONG_SECONDS[device])]
    cms = [("cms", *item) for item in bench_cms.items(device, quick)]
    parts = ((ops, bench_titans.FIRST), (others, 6 if device == "cuda" else 3), (layers, bench_layers.FIRST),
             (models, bench_model.FIRST),
             (cms, bench_cms.FIRST))
    for items, early in parts:
        yield from items[:early]
    for items, early in (parts[0], *parts[2:], parts[1]):
        yield from items[early:]


def names(device: str, quick: bool) -> dict[str, list[str]]:
    """The names of the cases, by section."""
    found: dict[str, list[str]] = {}
    for section, name, *_ in plan(device, quick):
        found.setdefault(section, []).append(name)
    return found
