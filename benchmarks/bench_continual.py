"""What remains of one document after another has been read: bits per byte on A before, after reading A, and
after reading B as well.

    python -m benchmarks.bench_continual --text FILE [FILE ...] [--title NAME ...] [--bytes 32768]
        [--out benchmarks/results/continual.json]

Documents are excerpts of different domains: the bundled model's own (John and Acts, held out of its training)
and one per --text. Every ordered pair (A, B) is read, three disjoint excerpts of each as the rows of one
batch. K is the number of CMS levels that learn: 0 none; 1 the first (period 64); 2 both (64, 256); 3 a third
of period 1024 on top, which begins as the identity (w_down = 0); lr = 1 / C for all, as in the bundled model.

What is measured, before, after A and after B, are pure reads (learn="off", on a clone), in which the CMS
weights stay as they are:

    A, B     the second half of the document that the row has read (or will read)
    A_other  the second half of another excerpt of A's domain, which the row never reads: adaptation
             without memorisation

from two states:

    cms      the CMS weights learned so far and nothing else: the Titans memories begin empty, as in a new
             sequence, and write while they read the half that is measured. What differs between before, after A
             and after B is the CMS alone.
    whole    (A only) the state as the reading left it: CMS weights, and memories that hold what they kept of A,
             or of A and B; they go on writing. "before" is the same fresh state as in cms.

"kept" is the share of the gain of reading A that is left after B: (before - after B) / (before - after A);
negative: worse than before.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from itertools import permutations

import torch
from torch import Tensor

from benchmarks import studies as s
from hope_kernels import HopeForCausalLM
from hope_kernels.identity import fingerprint
from hope_kernels.state import Counters

RESULT = os.path.join(os.path.dirname(__file__), "results", "continual.json")
LEVELS = (0, 1, 2, 3)
STAGES = ("before", "after_A", "after_B")


def learner(model: HopeForCausalLM, K: int, seed: int = 0) -> HopeForCausalLM:
    """The model with K learning levels; the first ones have its own weights, periods and rates."""
    cms = model.config.block_cms[0]
    chunks, rates = list(cms.chunks), [tuple(cms.matrix_rates(l).values()) for l in range(cms.num_levels)]
    while len(chunks) < K:
        chunks.append(4 * chunks[-1])
        rates.append(tuple(lr / 4 for lr in rates[-1]))
    rates = [own if l < K else 0.0 for l, own in enumerate(rates)]
    return s.with_cms(model, cms.replace(chunks=tuple(chunks), lr=tuple(rates)), seed)


def forgotten(state, model: HopeForCausalLM):
    """A fresh state of ``model`` with the CMS of ``state``: memories empty, no open segment, counters at 0.
    Shares no tensor with it."""
    fresh, zero = model.init_state(state.batch), [0] * state.batch
    return replace(fresh, cms=[None if c is None else replace(c, pos=Counters(zero)) for c in state.clone().cms])


def case(model: HopeForCausalLM, K: int, A: Tensor, B: Tensor) -> dict:
    """Reads A, then B [rows, T], with K learning levels: {"A", "A_other", "B"}: {"cms", "whole"}: {stage:
    bits per row}, and the speed."""
    model = learner(model, K)
    halves = {"A": A[:, A.shape[1] // 2 :], "B": B[:, B.shape[1] // 2 :]}
    halves["A_other"] = halves["A"].roll(1, 0)
    found: dict = {"A": {"cms": {}, "whole": {}}, "A_other": {"cms": {}}, "B": {"cms": {}}}
    state, seconds = model.init_state(A.shape[0]), 0.0
    for stage, document in zip(STAGES, (None, A, B)):
        if document is not None:
            began = time.perf_counter()
            _, reading = s.bits(model, document, "next_token" if K else "off", state)
            state, seconds = reading.state, seconds + time.perf_counter() - began
        for name, kinds in found.items():
            kinds["cms"][stage] = s.finite(s.bits(model, halves[name], "off", forgotten(state, model))[0])
        whole = found["A"]["whole"]
        whole[stage] = (
            found["A"]["cms"][stage] if document is None
            else s.finite(s.bits(model, halves["A"], "off", state.clone())[0])
        )
    return found | {
        "K": K, "seconds_reading": round(seconds, 2), "bytes_per_s": round((A.numel() + B.numel()) / seconds)
    }


def kept(stages: dict[str, list]) -> float | None:
    """The share of the gain of reading A that B has left, over the rows together; None without a gain."""
    before, after_a, after_b = (s.mean(stages[name]) for name in STAGES)
    return (
        (before - after_b) / (before - after_a) if after_a < before < float("inf") and after_b < float("inf")
        else None
    )


def table(result: dict) -> str:
    """Markdown of a result file: means over the excerpts."""
    rows = ["| A, then B | levels that learn | A: before | after A | after B | kept "
            "| unread A: before | after A | after B | kept | B: before | after B "
            "| with the memories, A: after A | after B |", "|---" * 14 + "|"]
    show = lambda stages, names=STAGES: " | ".join(f"{s.mean(stages[name]):.3f}" for name in names)
    percent = lambda share: "" if share is None else f"{share:.0%}"
    for r in result["cases"].values():
        read, other = r["A"]["cms"], r["A_other"]["cms"]
        rows.append(f"| {r['first']}, then {r['second']} | {r['K']} | {show(read)} | {percent(kept(read))} "
                    f"| {show(other)} | {percent(kept(other))} | {show(r['B']['cms'], ('before', 'after_B'))} "
                    f"| {show(r['A']['whole'], ('after_A', 'after_B'))} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--text", nargs="+", default=[], help="files of other domains, read as bytes; .gz is unpacked")
    p.add_argument("--title", nargs="+", help="how the result names them (default: the files' names)")
    p.add_argument("--model", default="kjv-byte")
    p.add_argument("--bytes", type=int, default=32 * 1024, help="of each document, each of three excerpts")
    p.add_argument("--levels", type=int, nargs="+", default=list(LEVELS))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--out", default=RESULT)
    p.add_argument("--table", action="store_true", help="only print what the file says, as Markdown")
    args = p.parse_args(argv)
    if args.table:
        print(table(s.load(args.out)))
        return
    if not args.text:
        p.error("--text: the other domains are missing")
    if args.title and len(args.title) != len(args.text):
        p.error(f"--title names {len(args.title)} texts, --text has {len(args.text)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    titles = args.title or [os.path.basename(path) for path in args.text]
    texts = {s.KJV_TITLE: s.text(s.KJV)} | {t: s.text(path) for t, path in zip(titles, args.text)}
    model = HopeForCausalLM.from_pretrained(args.model)
    setting = {"model": args.model, "weights": fingerprint(model), "bytes": args.bytes, "excerpts": s.ROWS,
               "seed": args.seed,
               "texts": {t: s.digest(data) for t, data in texts.items()}}
    study = s.Study(args.out, __doc__.split("\n")[0], setting)
    documents = {t: s.excerpts(data, args.bytes, args.bytes, args.seed) for t, data in texts.items()}
    for first, second in permutations(documents, 2):
        for K in args.levels:
            name = f"{first}, then {second}, K {K}"
            if name in study.cases:
                continue
            record = {"first": first, "second": second} | case(model, K, documents[first], documents[second])
            study.put(name, record)
            stages = " ".join(f"{stage} {s.mean(record['A']['cms'][stage]):.4f}" for stage in STAGES)
            print(f"{name}: A {stages}, {record['bytes_per_s']} bytes/s", flush=True)
    print(table(study.data))


if __name__ == "__main__":
    main()
