"""The loop over the cases of a run: each in turn, its record written as soon as it is there."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Iterable, Mapping

import torch

from benchmarks import measure as m
from benchmarks.device import ceilings_of
from benchmarks.records import Results
from benchmarks.sources import kernel_hash

RESTART = 3  # exit status of a child process that asks for a fresh one to go on
LATE = 8  # seconds that a case may go on after the time is up


def wanted(only: list[str], section: str, name: str) -> bool:
    return not only or section == "env" or any(o == section or o in name for o in only)


def measure(
    device: str, results: dict[str, Results], args, until: float,
    items: Iterable[tuple[str, str, dict, Callable]], *, limit: Callable[[str], float] | None = None,
    hung: Mapping[str, str] = {}, seconds: Callable[[str, str], float] = lambda section, name: 0.0,
    beats: Callable[[float], None] = lambda deadline: None,
) -> int:
    """Every case of ``items`` (as ``plan.plan`` gives them) that is not there yet; returns RESTART when this
    process should not go on.

    limit: this process is one of ``watch``: seconds that a case of a section may take, after which the
    process ends. hung: backends that hang, and where; their cases are skipped. seconds: what a case is
    expected to take; one for which there is no time left is passed over. beats: is told by when the case that
    begins will be over.
    """
    passed_over: list[str] = []
    for section, name, case, call in items:
        store = results[section]
        if name in store.cases or not wanted(args.only, section, name):
            continue
        case = case and case | {"device": device}
        if (backend := case.get("backend")) in hung:
            reason = f"{backend} hangs in {hung[backend]}"
            store.put(name, {"case": case, "status": "skipped", "reason": reason})
            print(line(section, name, store.cases[name]), flush=True)
            continue
        if time.time() + seconds(section, name) > until:
            passed_over.append(name)
            continue
        store.put(name, {"status": "started", "case": case})
        if limit is not None:
            most = min(limit(section), max(1.0, until + LATE - time.time()))
            beats(time.time() + most)
            faulthandler.dump_traceback_later(most, exit=True)
        ceilings = {n: results["env"].cases.get(n, {}).get(unit) for n, unit in ceilings_of(device).items()}
        now = m.Beside(args.quick) if device == "cpu" and limit is None and section != "env" else {}
        began, restart = time.time(), False
        try:
            record = {"status": "ok"} | call(now or ceilings) | ({"ceilings": dict(now)} if now else {})
            restart = record.pop("restart", False)
            if not restart:  # an asynchronous error belongs to this case
                m.sync(device)
        # a configuration that the backend does not serve, a peer that is not installed
        except (m.Unserved, ImportError) as e:
            record = {"status": "skipped", "reason": str(e)}
        except m.WrongResult as e:
            record = {"status": "refused", "reason": str(e)}
        except torch.OutOfMemoryError as e:
            record = {"status": "skipped", "reason": f"out of memory: {e}".splitlines()[0]}
        except Exception as e:  # whatever else: recorded, and the CUDA context may be broken
            record = {"status": "failed", "reason": f"{type(e).__name__}: {e}"[:2000]}
            restart = limit is not None
        faulthandler.cancel_dump_traceback_later()
        beats(0.0)
        kernel = kernel_hash(case)
        store.put(
            name, {"case": case} | record | {"seconds": round(time.time() - began, 2)}
            | ({"kernel": kernel} if kernel else {})
        )
        print(line(section, name, store.cases[name]), flush=True)
        if restart:
            return RESTART
        if device == "cuda":
            torch.cuda.empty_cache()
    if passed_over:
        print(f"  no time left for {len(passed_over)} cases, {passed_over[0]} first", flush=True)
    return 0


def line(section: str, name: str, r: dict) -> str:
    ms = r.get("ms", {}).get("median")
    parts = [f"{section:11} {name:52} {r['status']:8}", f"{ms:10.4f} ms" if ms is not None else ""]
    parts += [f"{r[k]:8.1f} {k}" for k in ("TFLOP/s", "GB/s", "tokens/s") if r.get(k)]
    parts += [f"{r[k]:7.1%} {k}" for k in ("of_matmul", "of_fma", "of_copy") if r.get(k)]
    return " ".join([p for p in parts if p] + [str(r.get("reason") or "")[:200]]).rstrip()
