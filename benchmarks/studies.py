"""What the studies of the CMS share: texts as rows of a batch, a model under another CMS, bits per byte,
results that outlive a kill."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, write_json
from benchmarks.sources import mark
from hope_kernels import CMSConfig, HopeForCausalLM
from hope_kernels.config import HopeConfig
from hope_kernels.engine.generation import Reading, read
from hope_kernels.folders import ASSETS

KJV = os.path.join(ASSETS, "kjv-john-acts.txt.gz")  # what the bundled model's training held out
KJV_TITLE = "John and Acts (KJV)"
ROWS = 3


def text(path: str) -> bytes:
    """A file's bytes; .gz is unpacked."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
        return f.read()


def excerpts(data: Sequence[int], length: int, longest: int, seed: int, rows: int = ROWS) -> Tensor:
    """[rows, length] int64: disjoint excerpts, one from each of ``rows`` equal parts of the text (bytes, or token
    ids), at offsets drawn from ``seed``.

    Room is left for ``longest`` of them, so a shorter excerpt is the start of the longer one of the same seed.
    Raises ValueError if the text is too short.
    """
    part = len(data) // rows
    if part < longest:
        raise ValueError(f"excerpts: argument data has {len(data)} tokens, expected at least {rows} x {longest}")
    g = torch.Generator().manual_seed(seed)
    starts = [row * part + int(torch.randint(0, part - longest + 1, (), generator=g)) for row in range(rows)]
    return torch.tensor([list(data[s : s + length]) for s in starts])


def with_cms(
    model: HopeForCausalLM, cms: CMSConfig | Sequence[CMSConfig | None], seed: int = 0
) -> HopeForCausalLM:
    """The same weights with another CMS in every block, or one for each. Levels that the model does not have begin as
    the identity, with matrices of the usual sizes, which relative rates are relative to: hidden units come in pairs,
    one like the other going in and opposite going out, drawn from ``seed``."""
    changed = cms.to_dict() if isinstance(cms, CMSConfig) else [c and c.to_dict() for c in cms]
    other = HopeForCausalLM(HopeConfig.from_dict({**model.config.to_dict(), "cms": changed}))
    kept = {n: p for n, p in model.state_dict().items() if n in other.state_dict()}
    other.load_state_dict(kept, strict=False)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in kept or p.dim() != 2:
                continue
            units = p.mT if name.endswith(".down") else p
            drawn = torch.randn(len(units) // 2, units.shape[1], generator=g) * p.shape[1] ** -0.5
            units.zero_()
            for i, sign in enumerate((1, -1 if name.endswith(".down") else 1)):
                units[i : 2 * len(drawn) : 2].copy_(sign * drawn)
    return other.to(model.embed.weight.device).eval()


def cms_of(model: HopeForCausalLM) -> CMSConfig:
    """Of the first block whose CMS learns, or of the first that has one."""
    found = [c for c in model.config.block_cms if c is not None]
    return next((c for c in found if any(c.learning_rates)), found[0])


def bits(
    model: HopeForCausalLM, ids: Tensor, learn: str, state=None, last: Tensor | None = None, piece: int = 4096,
    **options: Any,
):
    """(bits per byte of each row of ids [B, T], the reading). options: of ``read``. A piece holds 8 segments at least:
    one that ends with its call is read twice, since its last token has no loss before the next call."""
    reading = read(
        model, ids, state, learn=learn, last=last, piece=max(piece, 8 * model.segment), check_finite=False,
        **options,
    )
    return [float(n) / math.log(2) / p for n, p in zip(reading.nats, reading.predicted)], reading


def from_place(model: HopeForCausalLM, ids: Tensor, at: int, learn: str) -> tuple[list[float], Reading]:
    """Bits per byte of every row from ``at`` on, what is before having been read by the same rule."""
    _, first = bits(model, ids[:, :at], learn)
    return bits(model, ids[:, at:], learn, first.state, first.logits)


def by_rows(measure: Callable[[dict[str, Tensor]], dict], texts: dict[str, Tensor], together: int) -> dict:
    """What ``measure`` finds of the rows of all texts, ``together`` of them at a time: its lists, which have a value
    per row, one behind the other, and its numbers summed."""
    rows = range(0, len(next(iter(texts.values()))), together)
    return _joined([measure({name: ids[b : b + together] for name, ids in texts.items()}) for b in rows])


def _joined(parts: list) -> Any:
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return sum(parts, []) if isinstance(parts[0], list) else sum(parts)


def finite(values: list[float]) -> list[float | None]:
    """For JSON, which has no NaN: None where a row diverged."""
    return [v if math.isfinite(v) else None for v in values]


def mean(values: list[float | None]) -> float:
    """The mean; infinite when any row diverged."""
    return math.inf if None in values else sum(values) / len(values)


def best_rate(first: float, loss: Callable[[float], float], widest: int, factor: float = 2.0) -> float:
    """Tries rates, ``factor`` apart, outwards from ``first`` until the best one has a worse one on either side; at
    most ``widest`` of them on a side. loss(rate): infinite where it diverges."""
    found: dict[int, float] = {}

    def tried(k: int) -> float:
        if k not in found:
            found[k] = loss(first * factor**k)
        return found[k]

    k = 0
    tried(k)
    while True:
        beside = [j for j in (k - 1, k + 1) if abs(j) <= widest]
        better = [j for j in beside if tried(j) < found[k]]
        if not better:
            return first * factor**k
        k = min(better, key=tried)


def load(path: str) -> dict:
    with open(path) as f:
        return json.load(f)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def arguments(
    p: argparse.ArgumentParser, argv: list[str] | None, result: str, table: Callable[[dict], str]
) -> argparse.Namespace | None:
    """Those of ``p`` and of every study: threads, and the file. None where only its table was asked for, and has been
    printed."""
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--out", default=result)
    p.add_argument("--table", action="store_true", help="only print what the file says, as Markdown")
    args = p.parse_args(argv)
    if args.table:
        print(table(load(args.out)))
        return None
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


class Study:
    """One JSON file {"what", "machine", "setting", "cases": {name: record}, ...}, rewritten whole after every case.

    What the file has is kept: a case that is there is not run again. Raises ValueError for a file of another
    setting. kind: what it measures, by the names of ``benchmarks/sources.py``.
    """

    def __init__(self, path: str | None, what: str, setting: dict, kind: str = "model"):
        self.kind = kind
        self.path, self.data = path, {"what": what, "machine": machine(), "setting": setting, "cases": {}}
        if path is None or not os.path.exists(path):
            return
        found = load(path)
        theirs, mine = found.get("setting", {}), json.loads(json.dumps(setting))
        wrong = sorted(k for k in {*theirs, *mine} if theirs.get(k) != mine.get(k))
        if wrong:
            raise ValueError(
                f"{path} holds results of another setting ({', '.join(wrong)}); move it away or name another --out"
            )
        self.data["cases"] = found["cases"]

    @property
    def cases(self) -> dict[str, dict]:
        return self.data["cases"]

    def put(self, name: str, record: dict, **more) -> None:
        """Adds a case, with a hash of the code it measured, and ``more`` (what follows from all cases) at the
        top level."""
        self.cases[name] = mark(self.kind, device="cuda" if torch.cuda.is_available() else "cpu") | record
        self.data |= more
        if self.path is not None:
            write_json(self.path, self.data)

    def run_at_best(
        self, name: str, rates: Sequence[float], seeds: Sequence[int], train: Callable[[float, int], dict], shown: str
    ) -> None:
        """The cases "search NAME RATE" of seed 0, and "run NAME seed N" at the rate whose "loss" is the least; None is
        the worst. train(rate, seed): the record. shown: the field of it that is printed."""
        losses = {}
        for lr in rates:
            case = f"search {name} {lr:g}"
            if case not in self.cases:
                self.put(case, train(lr, 0))
            value = self.cases[case]["loss"]
            losses[lr] = math.inf if value is None else value
        lr = min(losses, key=losses.__getitem__)
        for seed in seeds:
            case = f"run {name} seed {seed}"
            if case not in self.cases:
                self.put(case, self.cases[f"search {name} {lr:g}"] if seed == 0 else train(lr, seed))
                print(f"{case}: {self.cases[case][shown]}", flush=True)
