"""``make demo``: the bundled model reads a long text it was not trained on, once as it is and once learning
while it reads."""

from __future__ import annotations

import gzip
import math
import os
import tempfile
import time

import torch
from tqdm import tqdm

from ..engine.generation import read
from ..folders import ASSETS, bundled_models
from ..model import HopeForCausalLM
from ..model_state import ModelState
from ..state_file import load_state
from .meter import PeakMemory, megabytes

TEXT = "kjv-john-acts.txt.gz"
PIECE = 1024
BYTES = 105_000  # of the text, unless told otherwise: some twenty seconds on two cores
FEWEST = 4 * PIECE  # with fewer, no piece ends in the last quarter but the last one


def held_out_text() -> bytes:
    """The Gospel of John and the Acts (King James Version): held out of the bundled model's training."""
    with gzip.open(os.path.join(ASSETS, TEXT)) as f:
        return f.read()


def measured_read(model, ids: torch.Tensor, learn: str) -> dict:
    """Reads ids [1, T]; returns bits per byte (all, last quarter), tokens/s, peak memory of the first and
    last tenth, the reading."""
    T = ids.shape[1]
    marks: list[tuple[int, float]] = []
    peaks: list[int] = []
    with PeakMemory(ids.device) as peak, tqdm(total=T, unit="B", unit_scale=True, desc=f"learn={learn}") as bar:
        def on_piece(at: int, nats: float) -> None:
            marks.append((at, nats))
            bar.update(at - bar.n)
            bar.set_postfix(bits=f"{nats / math.log(2) / max(at - 1, 1):.3f}", refresh=False)
            while (len(peaks) + 1) * T <= 10 * at:
                peaks.append(peak.take())

        began = time.perf_counter()
        reading = read(model, ids, learn=learn, piece=PIECE, on_piece=on_piece)
        seconds = time.perf_counter() - began
    at, nats = next(m for m in marks if m[0] >= 0.75 * T)
    return {
        "bits": marks[-1][1] / math.log(2) / (T - 1),
        "last_quarter": (marks[-1][1] - nats) / math.log(2) / (T - at),
        "speed": T / seconds, "first_peak": peaks[0], "last_peak": peaks[-1], "reading": reading,
    }


def demo(count: int | None = None) -> int:
    if count is not None and count < FEWEST:
        raise ValueError(f"argument --bytes is {count}, expected at least {FEWEST}")
    # products this small gain nothing from a second thread, and lose much on a busy machine
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = bundled_models()[0]
    model = HopeForCausalLM.from_pretrained(name, device=device)
    text = held_out_text()[: BYTES if count is None else count]
    ids = torch.tensor([list(text)], dtype=torch.long, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model {name}: {parameters / 1e6:.2f} M parameters on {device}")
    print(f"text: the first {len(text)} bytes of John and Acts, held out of its training\n")
    results = {}
    with torch.no_grad():
        for learn in ("off", "next_token"):
            results[learn] = measured_read(model, ids, learn)
    print(f"\n{'':24}{'learning off':>14}{'learning on':>14}")
    off, on = results["off"], results["next_token"]
    rows = [
        ("tokens read", lambda r: f"{len(text)}"), ("tokens/s", lambda r: f"{r['speed']:.0f}"),
        ("bits per byte", lambda r: f"{r['bits']:.3f}"),
        ("  of the last quarter", lambda r: f"{r['last_quarter']:.3f}"),
        ("peak memory, 1st tenth", lambda r: megabytes(r["first_peak"])),
        ("peak memory, last tenth", lambda r: megabytes(r["last_peak"])),
    ]
    for label, show in rows:
        print(f"{label:24}{show(off):>14}{show(on):>14}")
    print(f"\nlast quarter, on / off: {on['last_quarter'] / off['last_quarter']:.3f}")

    state, logits = on["reading"].state, on["reading"].logits
    first = logits.argmax(-1, keepdim=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "session.safetensors")
        state.save(path)
        size = os.path.getsize(path)
        straight = model.generate(first, 200, state, temperature=0.7, seed=1)
        loaded = load_state(path, device)
        assert isinstance(loaded, ModelState)
        restored = model.generate(first, 200, loaded, temperature=0.7, seed=1)
    words = bytes(
        text[-160:] + bytes(first[0].tolist()) + bytes(straight.tokens[0].tolist())
    ).decode(errors="replace")
    print(f"\nthe end of the text and the continuation:\n{'-' * 60}\n{words}\n{'-' * 60}")
    same = torch.equal(straight.tokens, restored.tokens)
    verdict = "identical, token for token" if same else "DIFFERENT"
    print(f"session saved ({size / 2**20:.1f} MB), restored from the file and continued: {verdict}")
    return 0 if same else 1
