"""The tables of what models learned: studies, and a real model."""

from __future__ import annotations

from benchmarks import (
    bench_continual,
    bench_languages,
    bench_lm,
    bench_mad,
    bench_needles,
    bench_optim,
    bench_rates,
    bench_recall,
)
from benchmarks.continual import bank, chain, pairs
from benchmarks.markdown import markdown, source, threads
from benchmarks.real import tables as real_tables
from benchmarks.synthetic.mad import CHOICES
from benchmarks.synthetic.paper import ABLATIONS


def languages(run: dict) -> str:
    data = run["languages"]
    return (f"{bench_languages.table(data)}\n\nOne block, trained on words of up to {bench_languages.TRAINED} symbols "
            f"for at most {data['setting']['steps']} steps (the column says how many were needed), at the rate, of "
            f"those in the program, that reads other words of twice the length best; mean (least to most) over the "
            f"seeds. {source('bench_languages', 'languages')}")


def mad(run: dict) -> str:
    setting, rates = run["mad"]["setting"], ", ".join(f"{rate:g}" for rate in bench_mad.RATES)
    return (f"{bench_mad.table(run['mad'])}\n\nShare of right answers among {bench_mad.TESTED} sequences never seen, "
            f"chance {1 / CHOICES:.3f}, after at most {setting['steps']} steps (those needed stand beside, at the best "
            f"rate of {rates}: where it is the first or the last, a better one may lie beyond); mean (least to most) "
            f"over {seeds(run['mad'])} seeds. {source('bench_mad', 'mad')}")


def seeds(data: dict) -> int:
    """Of the runs of a study."""
    return len({name.rsplit(" ", 1)[1] for name in data["cases"] if name.startswith("run ")})


def needles(run: dict) -> str:
    return _needles("needles", run, "tokens", "noise", "0.031", "an even place")


def text_needles(run: dict) -> str:
    return _needles("text_needles", run, "bytes", "text", "0.038", "a multiple of 4", " --text FILE")


def _needles(name: str, run: dict, units: str, hay: str, chance: str, place: str, options: str = "") -> str:
    data, rates = run[name], sorted(bench_needles.RATES)
    return (f"{bench_needles.table(data)}\n\nShare of right answers by {units} of {hay}, 4 needles, chance {chance}, "
            f"{data['setting']['sequences']} sequences of each length; trained on {bench_needles.FIRST} to "
            f"{bench_needles.LAST} {units}. A needle begins at {place}. "
            f"The best of {len(rates)} rates from {rates[0]:g} to {rates[-1]:g}. "
            f"{source(f'bench_{name}{options}', name)}")


def lm(run: dict) -> str:
    setting, texts = run["lm"]["setting"], "--text FILE ... --test NAME=FILE ... --other NAME=FILE ..."
    read = setting["steps"] * setting["batch"] * setting["tokens"]
    return (f"{bench_lm.table(run['lm'])}\n\nBits per byte by length of the context, learning off and on, mean (least "
            f"to most) over the seeds; trained on {read / 1e6:.1f} million bytes (d = {setting['d_model']}, "
            f"{setting['layers']} layers), at the best rate after "
            f"{setting['search_steps']} steps. Bytes/s of one core, by its own seconds, other work on the machine. "
            f"{source(f'bench_lm --threads 1 {texts}', 'lm')}\n\n{ablations()}")


def ablations() -> str:
    """The paper's figures for what it leaves out of HOPE."""
    whole, *parts = (f"{part} {perplexity:.2f} ({accuracy:g}%)" for part, (perplexity, accuracy) in ABLATIONS.items())
    return (f"The paper's own (Table 6), perplexity of language modelling and accuracy of reasoning: {whole}; "
            f"without {', '.join(parts)}.")


def optim(run: dict) -> str:
    setting = run["optim"]["setting"]
    return (f"{bench_optim.table(run['optim'])}\n\nBits per byte of held-out text after {setting['steps']} steps of a "
            f"byte model (d = {setting['d_model']}, {setting['layers']} layers), mean over {seeds(run['optim'])} "
            f"seeds; seconds of the processor. {source('bench_optim --threads 1', 'optim')}")


def learning(run: dict) -> str:
    rows = [(title, r["bytes"], *(f"{x:.3f}" for x in (
        r["off"]["last_quarter"], r["on_lr_x1"]["last_quarter"], r["on_lr_x1"]["last_quarter_on_over_off"],
        r["off_no_memory_writes"]["last_quarter"]))) for title, r in run["learning"].items()]
    head = "text | bytes | learning off | learning on | on / off | memories' writes off too"
    return (f"{markdown(head, rows)}\n\nBits per byte of the last quarter, bundled model, one reading. "
            f"{source('bench_learning --text FILE', 'learning')}")


def learning_memory(run: dict) -> str:
    """The table, and memory and speed of the first text."""
    first = next(iter(run["learning"].values()))
    peaks = [mib for _, mib in first["on_lr_x1"]["peak_memory_mib_per_10k_bytes"]]
    late = min(20, len(peaks))
    return (f"{learning(run)}\n\nPeak memory of the same process while reading with learning: {peaks[0]:.0f} MiB "
            f"in the first 10,000 bytes, {peaks[late - 1]:.0f} MiB between {10 * (late - 1)},000 and {10 * late},000. "
            f"Reading speed: {first['off']['bytes_per_s']:.0f} bytes/s off, {first['on_lr_x1']['bytes_per_s']:.0f} on, "
            f"{threads(first)}, other work on the machine.\n\nWhat the memories write is worth what the columns "
            "learning off and writes off have between them.")


def recall(run: dict) -> str:
    data = run["recall"]
    rates = ", ".join(f"{rate:g}" for rate in bench_recall.RATES)
    return (f"{bench_recall.table(data)}\n\nShare of right answers, mean and range over the seeds, chance 0.031: 20 "
            f"keys in 28 tellings, or {bench_recall.KEYS} keys told once. {data['setting']['steps']} steps of "
            f"{data['setting']['rows']} sequences; rates chosen from {rates}. {source('bench_recall', 'recall')}")


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
    "forgetting_slow": (bench_continual.slow_table, "As above, in excerpts of 49,152 tokens and with gradient descent, "
                        "all at its rate of equal gain."),
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
