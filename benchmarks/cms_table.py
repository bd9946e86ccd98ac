"""The results of bench_cms and of the models beside it, as Markdown."""

from __future__ import annotations


def table(result: dict) -> str:
    """Markdown of the cases of a result file."""
    found = [r for r in result["cases"].values() if r.get("status") == "ok" and r.get("case", {}).get("kind")]
    of = lambda kind: [(r["case"], r) for r in found if r["case"]["kind"] == kind]
    lines: list[str] = []

    def section(title: str, head: str, rows: list[tuple]) -> None:
        if rows:
            lines.extend(["", f"**{title}**", "", f"| {head} |"])
            lines.append("|---" * (head.count("|") + 1) + "|")
            lines.extend("| " + " | ".join(map(str, row)) + " |" for row in rows)

    section("Reading, against a torch module of equal weights",
            "d | levels | weights | tokens | ms | of the module's rate | compiled",
            [(c["d"], c["K"], c["rows"], f"{c['B']} x {c['C']}", f"{r['ms']['median']:.2f}",
              f"{r['of_module']:.2f}", f"{r['of_compiled']:.2f}" if r.get("of_compiled") else "")
             for c, r in of("forward")])
    ceiling = "FMA ceiling" if any("of_fma" in r for r in found) else "GEMM rate"
    titles = {"refresh": "Refresh of one level",
              "segment": "A segment through one level: read, errors, refresh"}
    for kind, title in titles.items():
        section(title, f"optimizer | d | C | rows | ms | GB/s | of the copy rate | TFLOP/s | of the {ceiling}",
                [(c["optimizer"], c["d"], c["C"], c["B"], f"{r['ms']['median']:.3f}", f"{r['GB/s']:.1f}",
                  share(r["of_copy"]), f"{r['TFLOP/s']:.3f}", share(r.get("of_fma", r.get("of_matmul"))))
                 for c, r in of(kind)])
    section("Refreshes kept as factors, then folded",
            "d | C | rows | slots | tokens/s | folded at once | ratio",
            [(c["d"], c["C"], c["B"], c["T"], f"{r['tokens/s']:.0f}", f"{r['at_once_tokens/s']:.0f}",
              f"{r['of_at_once']:.2f}") for c, r in of("pending")])
    section("Models", "model | rows | tokens | learning off, tokens/s | on | on / off",
            [(c["model"], c["B"], c["T"], f"{r['off_tokens/s']:.0f}", f"{r['tokens/s']:.0f}",
              f"{r['on_per_off']:.2f}") for c, r in of("prefill")])
    section("State of one row", "model | level | period | needed, KiB | held, KiB",
            [(c["model"], v["level"], v["period"], f"{v['formula'] / 1024:.0f}",
              f"{v['measured'] / 1024:.0f}") for c, r in of("state") for v in r["levels"]])
    for c, r in of("long"):
        lines += ["", long_run(c, r)]
    return "\n".join(lines).strip()


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def long_run(case: dict, r: dict) -> str:
    early, late = r["decode_ms"]
    return (f"{case['model']}, {r['tokens']} tokens with learning: {r['tokens/s']:.0f} tokens/s; peak memory "
            f"{r['peak_mib_first']:.0f} MiB in the first tenth, {r['peak_mib_last']:.0f} in the last; "
            f"a decoded token {early['p50']:.2f} ms after {early['after']} tokens, {late['p50']:.2f} ms "
            f"after {late['after']} (medians).")
