"""The tables of README and docs, made from the result files.

    python -m benchmarks.tables [--check]

Rewrites what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` in DOCUMENTS, for every NAME in
BLOCKS. --check changes nothing and fails where a block is not what the results give. A number in such a block
is never typed.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import (
    bench_languages,
    bench_lm,
    bench_mad,
    bench_needles,
    bench_optim,
    bench_rates,
    bench_recall,
    cms_table,
    plot,
    verdicts,
)
from benchmarks.budget import table as budget_table
from benchmarks.continual import bank, chain, pairs
from benchmarks.real import tables as real_tables
from benchmarks.records import RESULTS, load, runs
from benchmarks.sources import ROOT, at_rest
from benchmarks.synthetic.mad import CHOICES
from benchmarks.synthetic.paper import ABLATIONS

DOCUMENTS = ("README.md", "docs/backends.md", "docs/benchmarks.md", "docs/budget.md", "docs/claims.md",
             "docs/continual.md", "docs/llama.md", "docs/optim.md", "docs/real.md", "docs/serve.md")
WIDTH = 110
WORDS = {1: "one thread", 2: "two threads"}


def markdown(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table; ``head`` is "a | b | c"."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def source(command: str, file: str) -> str:
    return f"`python -m benchmarks.{command}`, `benchmarks/results/{file}.json`."


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


def decode(run: dict) -> str:
    data = run["decode"]
    spread = lambda s, unit="": f"{s['median']:.0f}{unit} ({s['least']:.0f} to {s['most']:.0f})"
    rows = [(c["B"], c["learn"], c["how"], spread(c["us"]), f"{c['step']['median']:.0f}", spread(c["pytorch"]),
             f"{c['ratio']['median']:.1f}") for c in data["cases"]]
    head = "rows | learn | tokens | a step, us | of it C++ | a step in PyTorch, us | ratio"
    same = "the same tokens" if all(c["same tokens"] for c in data["cases"]) else "**not always the same tokens**"
    threads = WORDS.get(data["machine"]["threads"], "several threads")
    llama = next((f" llama.cpp, of a random Llama of as many weights in fp32, one row, by its server's clock: "
                  f"{spread(c['llama.cpp'])} us." for c in data["cases"] if "llama.cpp" in c), "")
    return (f"{markdown(head, rows)}\n\n`generate` with the bundled model ({data['weights'] / 1e6:.1f} M weights, "
            f"fp32), {threads}; both ways write {same}. Medians of {data['rounds']} rounds (least to most) that "
            f"take turns.{llama} {source('bench_decode', 'decode')}")


def reading(run: dict) -> str:
    data = run["reading"]
    spread = lambda us: f"{us['median']:.0f} ({us['least']:.0f} to {us['most']:.0f})"
    off = [(c["case"], spread(c["us"]), spread(c["library"]), f"{c['ratio']['median']:.2f}") for c in data["off"]]
    on = [(c["B"], c["how"], spread(c["us"]), spread(c["pytorch"]), f"{c['ratio']['median']:.2f}",
           f"{c['over off']['median']:.2f}") for c in data["cases"]]
    clock = {"cpu": "seconds of the processor, other work on the machine", "wall": "wall clock"}[data["clock"]]
    threads = WORDS.get(data["machine"]["threads"], "several threads")
    return (f"{markdown('learning off, T = 512 | us a token | with products of MKL | ratio', off)}\n\n"
            f"{markdown('rows | reading | us a token | segments in PyTorch | ratio | of learning off', on)}\n\n"
            f"The bundled model (a byte is a token), and layers of the default configuration in fp32; {threads}, "
            f"{clock}; medians of {data['rounds']} rounds (least to most) that take turns. \"guarded\" is what `read` "
            f"does unless told otherwise. {source('bench_reading', 'reading')}")


def products(run: dict) -> str:
    data = run["products"]
    rows = [(f"{c['tokens']} x {c['inputs']} x {c['outputs']}", *(f"{rate:.0f}" for rate in c["gflops"].values()))
            for c in data["cases"]]
    return (f"{markdown('tokens x inputs x outputs | own | PyTorch | oneDNN', rows)}\n\nGFLOP/s of one core, best of "
            f"{data['rounds']} rounds that take turns, \"oneDNN\" with the weight packed for it beforehand; a loop of "
            f"fused multiply-adds reaches {data['fma gflops']:.0f}. {source('bench_products', 'products')}")


def train(run: dict) -> str:
    data = run["train"]
    spread = lambda us: f"{us['median']:.0f} ({us['least']:.0f} to {us['most']:.0f})"
    rows = [(c["backend"], *(spread(c["us"][part]) for part in ("step", "forward", "backward", "optimizer")))
            for c in data["cases"]]
    threads = WORDS.get(data["machine"]["threads"], "several threads")
    return (f"{markdown('memories by | a step, us a token | forward | backward | clipping, optimizer', rows)}\n\n"
            f"Model of examples/train_lm.py, AdamW, {data['batch']} rows of {data['tokens']} tokens, {threads}, "
            f"medians of {data['rounds']} steps (least to most) that take turns. {source('bench_train', 'train')}")


def languages(run: dict) -> str:
    data = run["languages"]
    return (f"{bench_languages.table(data)}\n\nOne block, trained on words of up to {bench_languages.TRAINED} symbols "
            f"for at most {data['setting']['steps']} steps (the column says how many were needed), at the rate, of "
            f"those in the program, that reads other words of twice the length best; mean (least to most) over the "
            f"seeds. {source('bench_languages', 'languages')}")


def mad(run: dict) -> str:
    setting = run["mad"]["setting"]
    return (f"{bench_mad.table(run['mad'])}\n\nShare of right answers among {bench_mad.TESTED} sequences never seen, "
            f"chance {1 / CHOICES:.3f}, after at most {setting['steps']} steps (those needed stand beside); mean "
            f"(least to most) over the seeds. {source('bench_mad', 'mad')}")


def needles(run: dict) -> str:
    return _needles("needles", run, "tokens", "noise", "0.031", "an even place")


def text_needles(run: dict) -> str:
    return _needles("text_needles", run, "bytes", "text", "0.038", "a multiple of 4")


def _needles(name: str, run: dict, units: str, hay: str, chance: str, place: str) -> str:
    data = run[name]
    return (f"{bench_needles.table(data)}\n\nShare of right answers by {units} of {hay}, 4 needles, chance {chance}, "
            f"{data['setting']['sequences']} sequences of each length; trained on {bench_needles.FIRST} to "
            f"{bench_needles.LAST} {units}. A needle begins at {place}. "
            f"{source(f'bench_{name}', name)}")


def lm(run: dict) -> str:
    setting = run["lm"]["setting"]
    read = setting["steps"] * setting["batch"] * setting["tokens"]
    return (f"{bench_lm.table(run['lm'])}\n\nBits per byte by length of the context, learning off and on, mean (least "
            f"to most) over the seeds; trained on {read / 1e6:.1f} million bytes (d = {setting['d_model']}, "
            f"{setting['layers']} layers), at the best rate after "
            f"{setting['search_steps']} steps. Bytes/s of one core, by its own seconds, other work on the machine. "
            f"{source('bench_lm --threads 1 --text FILE ...', 'lm')}\n\n{ablations()}")


def ablations() -> str:
    """The paper's figures for what it leaves out of HOPE."""
    whole, *parts = (f"{part} {perplexity:.2f} ({accuracy:g}%)" for part, (perplexity, accuracy) in ABLATIONS.items())
    return (f"The paper's own (Table 6), perplexity of language modelling and accuracy of reasoning: {whole}; "
            f"without {', '.join(parts)}.")


def optim(run: dict) -> str:
    setting = run["optim"]["setting"]
    return (f"{bench_optim.table(run['optim'])}\n\nBits per byte of held-out text after {setting['steps']} steps of a "
            f"byte model (d = {setting['d_model']}, {setting['layers']} layers), mean over the seeds; seconds of the "
            f"processor. {source('bench_optim --threads 1', 'optim')}")


def learning(run: dict) -> str:
    rows = [(title, r["bytes"], *(f"{x:.3f}" for x in (
        r["off"]["last_quarter"], r["on_lr_x1"]["last_quarter"], r["on_lr_x1"]["last_quarter_on_over_off"],
        r["off_no_memory_writes"]["last_quarter"]))) for title, r in run["learning"].items()]
    head = "text | bytes | learning off | learning on | on / off | memories' writes off too"
    return (f"{markdown(head, rows)}\n\nBits per byte of the last quarter, bundled model. "
            f"{source('bench_learning --text FILE', 'learning')}")


def learning_memory(run: dict) -> str:
    """The table, and memory and speed of the first text."""
    first = next(iter(run["learning"].values()))
    peaks = [mib for _, mib in first["on_lr_x1"]["peak_memory_mib_per_10k_bytes"]]
    late, threads = min(20, len(peaks)), WORDS.get(first["machine"]["threads"], "several threads")
    return (f"{learning(run)}\n\nPeak memory of the same process while reading with learning: {peaks[0]:.0f} MiB "
            f"in the first 10,000 bytes, {peaks[late - 1]:.0f} MiB between {10 * (late - 1)},000 and {10 * late},000. "
            f"Reading speed: {first['off']['bytes_per_s']:.0f} bytes/s off, {first['on_lr_x1']['bytes_per_s']:.0f} on, "
            f"{threads}, other work on the machine.\n\nWhat the memories write is worth what the columns learning "
            "off and writes off have between them.")


def recall(run: dict) -> str:
    data = run["recall"]
    rates = ", ".join(f"{rate:g}" for rate in bench_recall.RATES)
    return (f"{bench_recall.table(data)}\n\nShare of right answers, mean and range over the seeds, chance 0.031: 20 "
            f"keys in 28 tellings, or {bench_recall.KEYS} keys told once. {data['setting']['steps']} steps of "
            f"{data['setting']['rows']} sequences; rates chosen from {rates}. {source('bench_recall', 'recall')}")


def cms(run: dict) -> str:
    return f"{cms_table.table(run['cms'])}\n\n{source('bench_cms', 'cms')}"


def rates(run: dict) -> str:
    text = bench_rates.table(run["rates"])
    return (f"{text}\n\nBits per token (bytes, for the byte model): change with learning on, at the default rate, and "
            "in brackets the change of the segment that suffers most. "
            f"{source('bench_rates --real FOLDER --wiki FILE --plays FILE', 'rates')}")


REAL = {
    "real_domains": ("{}\n\nBits per token, means over excerpts of {tokens} tokens; learning with the defaults of "
                     "`convert` (all blocks, period 256), bf16. The worst segment of 256 tokens lost {worst:.3f} bits.",
                     real_tables.domains),
    "real_needles": ("{}\n\nFacts of five digits, asked of the session itself, with the text's last 512 tokens still "
                     "in its window, and the last fact among them; of its file, in a new process; and of its "
                     "learned weights alone, with nothing before the question.", real_tables.needles),
    "real_continual": ("{}\n\nFour documents, one of each domain, in turn.", real_tables.continual),
    "real_control": ("{}\n\nBits per token of a document's second half, read without learning by weights that have "
                     "learned the column's text.", real_tables.control),
    "real_speed": ("{}\n\nThe third kilotoken in a row, two threads; rounds: {rounds}. llama.cpp reads its own 4-bit "
                   "weights, the others bf16.", real_tables.speed),
}


def real(name: str, run: dict) -> str:
    data, (text, make) = run["real"], REAL[name]
    made = [c["tokens"] for c in real_tables.cases(data, "domains")]
    rounds = max((len(c["spread"]) for c in real_tables.cases(data, "speed")), default=0)
    options = "--model FOLDER --wiki FILE --plays FILE"
    return (text.format(make(data), tokens=max(made, default=0), worst=real_tables.worst(data), rounds=rounds)
            + f" {source(f'bench_real {options}', 'real')}")


FORGETTING = {
    "forgetting": (pairs.table, "{excerpts} excerpts of {length} tokens of each text. \"forgets\": bits of A after B "
                   "minus before it, of what gd forgets, over all pairs (least to most of one), where the rule gains "
                   "on B what the model's own rule gains at its own rates; pairs: in how many a rate does; the next "
                   "columns: there. Texts in which gd forgets under 0.05 bits have no share."),
    "forgetting_levels": (lambda data: pairs.table(data, "levels"), "Gradient descent, compared as above. Rank R / k: "
                          "k levels that learn products of that rank, equally many numbers together."),
    "forgetting_chain": (chain.table, "Bits of each text's last half at the end minus when it had been read, at rates "
                         "of equal gain over pairs. {texts} texts in the order of the columns, the last not shown; "
                         "mean (least to most) over the excerpts."),
    "forgetting_bank": (bank.table, "First halves of all texts in turn, then second halves; one stream for each of "
                        "{excerpts} excerpts. Forgotten: the most of them. Texts begin where blocks do."),
}


def forgetting(name: str, run: dict) -> str:
    data, (make, text) = run["continual"], FORGETTING[name]
    setting = data["setting"] | {"texts": len(data["setting"]["texts"])}
    return f"{make(data)}\n\n{text.format(**setting)} {source('bench_continual --text FILE ...', 'continual')}"


def forgetting_real(run: dict) -> str:
    data, of = run["continual_real"], run["continual_real"]["setting"]
    return (f"{pairs.table(data)}\n\nAs above, of {of['model']}: {of['excerpts']} excerpts of {of['length']} tokens. "
            f"{source('bench_continual --model FOLDER --parts pairs --length 1024 --text FILE ...', 'continual_real')}")


def context(run: dict) -> str:
    data = run["context"]
    off, on, layer = data["off"]["points"], data["next_token"]["points"], data["layer at once"]["points"]
    rows = [(a["tokens"], *(f"{p['tokens/s']:.0f}" for p in (c, a, b)),
             *(f"{p['decode_ms']['median']:.2f}" for p in (a, b)))
            for a, b, c in zip(off, on, layer)]
    head = "context | layer (d = 256), tok/s | model reads, tok/s | and learns | decoded token, ms | and learns"
    times, threads = data["learning"]["reading_per_learning"], WORDS[data["machine"]["threads"]]
    return (f"{markdown(head, rows)}\n\nReading without learning is {times:.1f} times as fast as with it. "
            f"Bundled model, {threads}, seconds of its CPU clock. {source('bench_context', 'context')}")


def sinks(run: dict) -> str:
    data = run["sinks"]
    ranges = list(dict.fromkeys(r for c in data["cells"] for r in c["bits"]))
    rows = [(c["text"], c["mode"], *(f"{c['bits'][r]:.3f}" if r in c["bits"] else "-" for r in ranges))
            for c in sorted(data["cells"], key=lambda c: c["text"])]
    head = " | ".join(("text", "visible", *(f"tokens {r}" for r in ranges)))
    model = f"{data['model']} ({data['parameters'] / 1e6:.0f}M parameters)"
    return (f"{markdown(head, rows)}\n\nBits per token by position, learning off: {model}, trained on contexts of "
            f"{data['trained']} tokens, window {data['window']}, {data['sinks']} sinks, fp32. \"kept\": sinks at "
            f"their own distance; \"re-rotated\": as `sinks=` does it. "
            f"{source('bench_sinks MODEL --texts NAME=FILE', 'sinks')}")


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


def goals(results: Path) -> str:
    """Ages and changed files are left to the command: they change without the results."""
    rows = verdicts.table(verdicts.rows(results))
    return markdown("what | goal | predicted | measured | verdict | on", rows) + (
        "\n\n`python -m benchmarks.report`. Predicted: from counted instructions and bytes and the assumptions of "
        "docs/budget.md, for an H200; nobody has measured these.")


def gpu(results: Path) -> str:
    devices = {name: run for name, run in runs(results).items() if name and not name.startswith("cpu-")}
    return "\n\n".join(device(name, run) for name, run in devices.items()) or "**No GPU figure exists.**"


def device(name: str, run: dict) -> str:
    """One card: every case with a time, and what has none."""
    share = lambda x: "" if x is None else f"{x:.0%}"
    rows, others = [], {}
    for section, data in run.items():
        for case, r in data["cases"].items():
            if section in ("env", "correctness") or r["status"] != "ok" or "ms" not in r:
                key = f"{section}: {r['status']}"
                others[key] = others.get(key, 0) + 1
            else:
                rows.append((case, f"{r['ms']['median']:.4f}",
                             *(f"{r[k]:.1f}" if r.get(k) else "" for k in ("TFLOP/s", "GB/s")),
                             *(share(r.get(k)) for k in ("of_matmul", "of_copy"))))
    mark = next(data["stamp"] for data in run.values())
    return (f"**{name}**, commit {mark['commit']}{', changed files' * mark['dirty']}, {mark['date']}\n\n"
            + markdown("case | ms | TFLOP/s | GB/s | of the GEMM rate | of the copy rate", rows)
            + "\n\nOther records: " + ", ".join(f"{n} {key}" for key, n in sorted(others.items())) + ".")


def figures(run: dict) -> str:
    """What the README shows."""
    return "\n\n".join((
        "**One layer on the CPU**, beside the token loop of nested-learning 0.2.0 (same function, same weights):",
        cpu(run), "**Learning while reading:**", learning(run)))


def plots(results: Path, folder: str) -> str:
    """The plots that there is data for, as images relative to a document; ``folder`` is "docs/" or ""."""
    found = [f"![{p.title}]({folder}{name})" for name, p in plot.drawn(results).items()]
    return "\n\n".join([*found, "`python -m benchmarks.plot` draws them from `benchmarks/results`."])


def blocks(results: Path, document: str) -> dict[str, Callable[[], str]]:
    """{block: what makes its text}; a block whose file is not there says so."""
    run = load(results)
    folder = "" if document.startswith("docs/") else "docs/"
    of_files = {"figures": figures, "cpu": cpu, "learning": learning_memory, "recall": recall,
                "context": context, "accuracy": accuracy, "sinks": sinks, "serve": serve, "decode": decode,
                "reading": reading, "products": products, "train": train, "languages": languages, "mad": mad, "needles": needles,
                "text_needles": text_needles, "lm": lm, "optim": optim,
                **{name: lambda run, make=make: make(run["budget"]) for name, make in budget_table.BLOCKS.items()},
                **{name: lambda run, name=name: real(name, run) for name in REAL},
                "cms": cms, "rates": rates, "forgetting_real": forgetting_real,
                **{name: lambda run, name=name: forgetting(name, run) for name in FORGETTING}}
    absent = lambda name: (f"Not measured yet: `python -m benchmarks.bench_{name}` writes "
                           f"`benchmarks/results/{name}.json`.")
    # what is not called as the block
    file = {"figures": "cpu", **dict.fromkeys(FORGETTING, "continual"), "forgetting_real": "continual_real",
            **dict.fromkeys(budget_table.BLOCKS, "budget"), **dict.fromkeys(REAL, "real")}
    made = lambda name, make: make(run) if (of := file.get(name, name)) in run else absent(of)
    return {name: lambda name=name, make=make: made(name, make) for name, make in of_files.items()} | {
        "goals": lambda: goals(results), "gpu": lambda: gpu(results), "plots": lambda: plots(results, folder)}


def wrapped(text: str) -> str:
    """Paragraphs and list items in lines of ``WIDTH``; tables, pictures and what stands alone as they are."""
    lines = []
    for line in text.split("\n"):
        keep = line.startswith(("|", "!["))
        indent = "  " if line.startswith("- ") else ""
        lines += [line] if keep or len(line) <= WIDTH else textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def rewritten(text: str, makers: dict[str, Callable[[], str]]) -> tuple[str, list[str]]:
    """A document with its blocks made anew, and the names of those that changed. Raises ValueError for a
    block without an end."""
    changed = []
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.M):
        if name not in makers:
            continue
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
        at = text.index(begin) + len(begin)
        if (stop := text.find(end, at)) < 0:
            raise ValueError(f"tables: block {name!r} has no line <!-- end {name} -->")
        made = wrapped(makers[name]())
        if text[at:stop] != made:
            changed.append(name)
        text = text[:at] + made + text[stop:]
    return text, changed


def stale(results: Path, documents: Path = ROOT) -> list[tuple[str, str]]:
    """(document, block) of what differs from the results."""
    return [(name, block) for name in DOCUMENTS
            for block in rewritten((documents / name).read_text(encoding="utf-8"), blocks(results, name))[1]]


@at_rest()
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--documents", type=Path, default=ROOT, metavar="DIR")
    args = p.parse_args(argv)
    found = stale(args.results, args.documents)
    for name, block in found:
        print(f"{name}: {block} {'differs' if args.check else 'rewritten'}")
    if not args.check:
        for name in dict.fromkeys(name for name, _ in found):
            path = args.documents / name
            path.write_text(
                rewritten(path.read_text(encoding="utf-8"), blocks(args.results, name))[0], encoding="utf-8"
            )
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
