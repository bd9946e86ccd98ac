"""The tables of what was timed on a CPU, and of how exact it is."""

from __future__ import annotations

from benchmarks import cms_table
from benchmarks.markdown import markdown, source, threads


def cpu(run: dict) -> str:
    data = run["cpu"]
    titans = all("titans_pytorch" in c for c in data["cases"]) and "; titans-pytorch 0.5.5 computes another function"
    rows = []
    for c in data["cases"]:
        m = {k: v["median"] for k, v in c.items() if isinstance(v, dict)}
        spread = f"{m['ratio']:.0f} ({c['ratio']['min']:.0f} to {c['ratio']['max']:.0f})"
        rows.append((c["dim"], c["chunk"], f"{m['same']:.0f}", f"{m['package']:.0f}", spread, f"{m['of_fma']:.0%}",
                     f"{m['ratio_drop_in']:.0f}" if "ratio_drop_in" in m else "-",
                     f"{m['default']:.0f}", f"{m['of_fma_default']:.0%}",
                     *([f"{m['titans_pytorch']:.0f}"] if titans else [])))
    head = ("width | chunk | ours, tok/s | nested-learning, tok/s | ratio | of the FMA ceiling "
            "| ratio of the drop-in class | default layer: tok/s | of the FMA ceiling")
    head += " | titans-pytorch, tok/s" if titans else ""
    error, T = max(c["relative_error"] for c in data["cases"]), data["cases"][0]["T"]
    mean = data["geometric_mean_ratio"]
    drop_in = ""
    if "default_chunks" in data:
        drop_in = (f" Of the drop-in class: **{data['geometric_mean_drop_in']:.1f}**, and with the package's default "
                   f"chunks of one token, d = {data['default_chunks']['dim']}: "
                   f"{data['default_chunks']['ratio_drop_in']['median']:.0f}.")
    return (f"{markdown(head, rows)}\n\nGeometric mean of the ratios: **{mean:.1f}**.{drop_in} Medians over "
            f"{data.get('rounds', 5)} rounds of one run, B = 1, T = {T}, fp32, {data['machine']['cores']} cores; "
            f"outputs equal to the package's to {error:.0e}{titans or ''}. "
            f"{source('bench_cpu', 'cpu')}")


def serve(run: dict) -> str:
    data, faults = run["serve"], run["serve"]["faults"]
    rate = lambda s: f"{s['tokens/s']:.0f} ({min(s['all']):.0f} to {max(s['all']):.0f})"
    lost = sum(n for name, n in faults.items() if name != "largest difference of a learned tensor")
    apart = f"{faults['largest difference of a learned tensor']:.0e}"
    return (f"{data['sessions']} sessions, {data['turns']} turns, {data['kills']} kills: {lost} sessions lost, "
            f"unreadable or other than alone; learned weights within {apart} of a lone run's; "
            f"{data['turns sent again']} requests sent again. The bundled model in fp64:\n\n"
            f"{markdown('sessions at a time | tokens/s', ((s['sessions'], rate(s)) for s in data['speed']))}\n\n"
            f"Median of {len(data['speed'][0]['all'])} (least to most), {data['machine']['cores']} cores. "
            f"{source('bench_serve', 'serve')}")


def spread(found: dict, unit: str = "") -> str:
    return f"{found['median']:.0f}{unit} ({found['least']:.0f} to {found['most']:.0f})"


def decode(run: dict) -> str:
    data = run["decode"]
    rows = [(c["B"], c["learn"], c["how"], spread(c["us"]), f"{c['step']['median']:.0f}", spread(c["pytorch"]),
             f"{c['ratio']['median']:.1f}") for c in data["cases"]]
    fastest = min(c["us"]["median"] / c["B"] for c in data["cases"])
    head = "rows | learn | tokens | a step, us | of it C++ | a step in PyTorch, us | ratio"
    same = "the same tokens" if all(c["same tokens"] for c in data["cases"]) else "**not always the same tokens**"
    llama = next((f" llama.cpp, of a random Llama of as many weights in fp32, one row, by its server's clock: "
                  f"{spread(c['llama.cpp'])} us." for c in data["cases"] if "llama.cpp" in c), "")
    return (f"{markdown(head, rows)}\n\n`generate` with the bundled model ({data['weights'] / 1e6:.1f} M weights, "
            f"fp32), {threads(data)}; both ways write {same}. Medians of {data['rounds']} rounds (least to most) that "
            f"take turns.{llama} {of_ceiling(data, fastest)} {source('bench_decode', 'decode')}")


def writing(run: dict) -> str:
    """What the README shows of ``decode``."""
    one = {c["how"]: c for c in run["decode"]["cases"] if c["B"] == 1 and c["learn"] == "off"}
    llama = one["greedy"].get("llama.cpp")
    beside = ""
    if llama is not None:
        beside = f" llama.cpp takes {spread(llama, ' us')} for a random Llama of as many weights, greedy."
    return (f"**Writing on a CPU:** {spread(one['greedy']['us'], ' us')} a token with the bundled model, greedy, and "
            f"{spread(one['drawn']['us'], ' us')} drawn; one thread, the whole of `generate`.{beside} "
            f"{source('bench_decode', 'decode')}")


def reading(run: dict) -> str:
    data = run["reading"]
    ceiling = max(c["fma gflops"]["median"] for c in data["off"])
    share = lambda c: f"{c['flops'] / c['us']['median'] / ceiling / 1e3:.0%}"
    off = [(c["case"], spread(c["us"]), share(c), spread(c["library"]), f"{c['ratio']['median']:.2f}")
           for c in data["off"]]
    on = [(c["B"], c["how"], spread(c["us"]), share(c), spread(c["pytorch"]), f"{c['ratio']['median']:.2f}",
           f"{c['over off']['median']:.2f}") for c in data["cases"]]
    clock = {"cpu": "seconds of the processor, other work on the machine", "wall": "wall clock"}[data["clock"]]
    llama = next((f" llama.cpp reads 512 tokens with a random Llama of as many weights in fp32 at "
                  f"{spread(c['llama.cpp'])} us a token, by its own clock."
                  for c in data["off"] if "llama.cpp" in c), "")
    heads = ("learning off, T = 512 | us a token | of the ceiling | with products of MKL | ratio",
             "rows | reading | us a token | of the ceiling | segments in PyTorch | ratio | of learning off")
    return (f"{markdown(heads[0], off)}\n\n{markdown(heads[1], on)}\n\n"
            f"The bundled model (a byte is a token), and layers of the default configuration in fp32; {threads(data)}, "
            f"{clock}; medians of {data['rounds']} rounds (least to most) that take turns. \"guarded\" is what `read` "
            f"does unless told otherwise. The ceiling: a loop of fused multiply-adds, {ceiling:.0f} GFLOP/s; "
            f"of learning's work, what passes errors back through memories is not counted.{llama} "
            f"{source('bench_reading', 'reading')}")


def products(run: dict) -> str:
    data = run["products"]
    rows = [(f"{c['tokens']} x {c['inputs']} x {c['outputs']}", *(f"{rate:.0f}" for rate in c["gflops"].values()))
            for c in data["cases"]]
    return (f"{markdown('tokens x inputs x outputs | own | PyTorch | oneDNN', rows)}\n\nGFLOP/s of one core, best of "
            f"{data['rounds']} rounds that take turns, \"oneDNN\" with the weight packed for it beforehand; a loop of "
            f"fused multiply-adds reaches {data['fma gflops']:.0f}. {source('bench_products', 'products')}")


def train(run: dict) -> str:
    data = run["train"]
    rows = [(c["backend"], *(spread(c["us"][part]) for part in ("step", "forward", "backward", "optimizer")))
            for c in data["cases"]]
    fastest = min(c["us"]["step"]["median"] for c in data["cases"])
    return (f"{markdown('memories by | a step, us a token | forward | backward | clipping, optimizer', rows)}\n\n"
            f"Model of examples/train_lm.py, AdamW, {data['batch']} rows of {data['tokens']} tokens, {threads(data)}, "
            f"medians of {data['rounds']} steps (least to most) that take turns. {of_ceiling(data, fastest)} "
            f"{source('bench_train', 'train')}")


def of_ceiling(data: dict, us: float) -> str:
    """What part of the ceiling a token of ``us`` microseconds reaches."""
    share = data["flops"] / us / data["fma gflops"] / 1e3
    return (f"A token's products, {data['flops'] / 1e6:.1f} MFLOP at least, would take {share:.0%} of the fastest of "
            f"these times at the rate of a loop of fused multiply-adds ({data['fma gflops']:.0f} GFLOP/s).")


def context(run: dict) -> str:
    data = run["context"]
    off, on, layer = data["off"]["points"], data["next_token"]["points"], data["layer at once"]["points"]
    rows = [(a["tokens"], *(f"{p['tokens/s']:.0f}" for p in (c, a, b)),
             *(f"{p['decode_ms']['median']:.2f}" for p in (a, b)))
            for a, b, c in zip(off, on, layer)]
    head = "context | layer (d = 256), tok/s | model reads, tok/s | and learns | decoded token, ms | and learns"
    times = data["learning"]["reading_per_learning"]
    return (f"{markdown(head, rows)}\n\nReading without learning is {times:.1f} times as fast as with it. "
            f"Bundled model, {threads(data)}, seconds of its CPU clock. {source('bench_context', 'context')}")


def accuracy(run: dict) -> str:
    data = run["accuracy"]
    grouped: dict[tuple, dict[float, dict]] = {}
    for c in data["cases"]:
        grouped.setdefault((c["backend"], c["dtype"], c["device"], c["alpha"]), {})[c["correlation"]] = c["error"]
    at = sorted({c["correlation"] for c in data["cases"]})
    rows = [(backend, dtype, device, f"{alpha:g}", *(f"{e[r]['o']:.1e}, {e[r]['state']:.1e}" for r in at))
            for (backend, dtype, device, alpha), e in grouped.items()]
    s, head = data["shape"], " | ".join(["backend | dtype | on | alpha", *(f"correlation {r:g}" for r in at)])
    return (f"{markdown(head, rows)}\n\nOutput and learned deviation, rms of the difference relative to fp64, the "
            f"worst of {s['seeds']} seeds; D = N = {s['D']}, C = {s['C']}, T = {s['T']}. "
            f"{source('bench_accuracy', 'accuracy')}")


def cms(run: dict) -> str:
    return f"{cms_table.table(run['cms'])}\n\n{source('bench_cms', 'cms')}"
