"""Runs of the command that are stopped, killed and taken up again end as uninterrupted ones do."""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupted import at_call

import hope_kernels as hk
from hope_kernels import state_file
from hope_kernels.cli.main import main
from hope_kernels.cli.meter import PeakMemory
from hope_kernels.cli.prompt import Prompt
from hope_kernels.engine.generation import read
from hope_kernels.engine.options import PIECE
from hope_kernels.state_file import load_note


def model(seed: int = 0) -> hk.HopeForCausalLM:
    torch.manual_seed(seed)
    config = hk.HopeConfig(
        256, 16, 1, titans=hk.TitansConfig(16), cms=hk.CMSConfig(16, (64, 256), expansion=1.0, lr=0.05)
    )
    return hk.HopeForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _bytes(capfdbinary):
    """What these models write is no text."""


N = 20_000  # bytes of the book: 5 pieces


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """A folder with a model, a book and what an uninterrupted run wrote and left."""
    folder = tmp_path_factory.mktemp("long")
    model().save_pretrained(folder / "model")
    text = torch.randint(97, 123, (N,), generator=torch.Generator().manual_seed(0))
    (folder / "book").write_bytes(bytes(text.tolist()))
    out = model().generate(text.unsqueeze(0), 30)
    out.state.save(folder / "whole")
    (folder / "out").write_bytes(bytes(out.tokens[0].tolist()) + b"\n")
    return folder


def arguments(folder: Path, session: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(folder / "model"), "--prompt-file", str(folder / "book"), "--session",
            str(session), "--quiet",
            "--temperature", "0", "--max-new-tokens", "30", *more]


def command(folder: Path, session: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hope_kernels", *arguments(folder, session, *more)]


def stopped_by(number: int, folder: Path, session: Path) -> subprocess.CompletedProcess:
    """A run that gets the signal while it waits for the end of the third piece, having saved its session
    after the first."""
    run = subprocess.Popen(command(folder, session, "--prompt-file", "-", "--save-every", "1e-6"),
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdin.write((folder / "book").read_bytes()[: 2 * PIECE + 100])
    run.stdin.flush()
    deadline = time.monotonic() + 60
    while not session.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)  # closes the pipe
    return subprocess.CompletedProcess(run.args, run.returncode, out, err)


def same_session(a: Path, b: Path) -> bool:
    first, second = hk.load_state(a), hk.load_state(b)
    tensors = all(torch.equal(x, y) for x, y in zip(first.tensors(), second.tensors(), strict=True))
    return tensors and first.pos == second.pos and load_note(a) == load_note(b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_while_reading_goes_on_where_it_was(book, tmp_path, monkeypatch, number, capfdbinary):
    session = tmp_path / "s"
    stopped = stopped_by(number, book, session)
    assert load_note(session)["bytes"] == PIECE and hk.load_state(session).pos == [PIECE]
    assert stopped.stdout == b"" and stopped.returncode == (130 if number == signal.SIGINT else -number)
    assert (f"stopped after reading {PIECE} bytes".encode() in stopped.stderr) == (number == signal.SIGINT)
    with standard_input(monkeypatch, book / "book"):
        assert main(arguments(book, session, "--prompt-file", "-")) == 0
    assert capfdbinary.readouterr().out == (book / "out").read_bytes()
    assert same_session(session, book / "whole")


def signal_in_call(monkeypatch, n: int, number: int = signal.SIGTERM) -> None:
    """The model's n-th call (a piece, or a token after the first one written) is when the signal comes."""
    at_call(monkeypatch, n, lambda: signal.raise_signal(number))


@contextlib.contextmanager
def standard_input(monkeypatch, path: Path, count: int = N):
    """The first bytes of the file come through a pipe."""
    r, w = os.pipe()
    with subprocess.Popen(["head", "-c", str(count), str(path)], stdout=w), open(r) as pipe:
        os.close(w)
        monkeypatch.setattr(sys, "stdin", pipe)
        yield


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_stopped_while_reading_and_again_while_writing(book, tmp_path, monkeypatch, capfdbinary, source):
    session, given = tmp_path / "s", arguments(book, tmp_path / "s")
    name = str(book / "book")
    if source == "pipe":
        given[given.index("--prompt-file") + 1], name = "-", "standard input"
    written = b""
    # 5 pieces and 29 tokens after the first: stopped in the 3rd piece, in the last one, in the 10th token, and not
    for call, phase, count in [(3, "reading", 0), (2, "writing", 1), (10, "writing", 11), (99, None, 30)]:
        with monkeypatch.context() as patch, standard_input(
            patch, book / "book"
        ) if source == "pipe" else contextlib.nullcontext():
            signal_in_call(patch, call)
            assert main(given) == (143 if phase else 0)
        written += capfdbinary.readouterr().out
        note = load_note(session)
        assert note == (phase and {
            "phase": phase, "prompt": name, "bytes": 3 * PIECE if call == 3 else N, "written": count,
            "sha256": hashlib.sha256((book / "book").read_bytes()[: note["bytes"]]).hexdigest()
        })
    assert written == (book / "out").read_bytes()
    assert same_session(session, book / "whole")


def test_a_pipe_that_dies_of_the_same_signal_is_not_the_end_of_the_prompt(book, tmp_path, monkeypatch, capfdbinary):
    """Ctrl-C in a terminal goes to the whole pipeline, and whoever feeds the pipe is gone first."""
    given = arguments(book, tmp_path / "s")
    given[given.index("--prompt-file") + 1] = "-"
    with monkeypatch.context() as patch, standard_input(patch, book / "book", 2 * PIECE + 100):
        signal_in_call(patch, 2)
        assert main(given) == 143
    assert load_note(tmp_path / "s")["bytes"] == 2 * PIECE
    with monkeypatch.context() as patch, standard_input(patch, book / "book"):
        assert main(given) == 0
    assert capfdbinary.readouterr().out == (book / "out").read_bytes() and same_session(
        tmp_path / "s", book / "whole"
    )


@pytest.mark.parametrize(
    ("every", "failing", "saves"), [("0", False, 1), ("1e-9", False, 4 + 30 + 1), ("1e-9", True, 4 + 30 + 1)]
)
def test_saves_meanwhile(book, tmp_path, monkeypatch, capfdbinary, every, failing, saves):
    """After every piece but the last, and every token; one that fails costs a message."""
    real, tries = state_file.write_atomically, []

    def write(path, data, mode) -> None:
        tries.append(0)
        if failing and len(tries) < saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data, mode)

    monkeypatch.setattr(state_file, "write_atomically", write)
    assert main(arguments(book, tmp_path / "s", "--save-every", every)) == 0
    printed = capfdbinary.readouterr()
    assert len(tries) == saves and printed.err.count(
        b"not saved, going on ([Errno 28]"
    ) == (saves - 1 if failing else 0)
    assert printed.out == (book / "out").read_bytes() and same_session(tmp_path / "s", book / "whole")
    assert main(arguments(book, tmp_path / "s", "--save-every", "-1")) == main(
        arguments(book, tmp_path / "s", "--save-every", "nan")
    ) == 2


def test_a_second_signal_aborts_and_leaves_the_old_file(book, tmp_path, monkeypatch, capfdbinary):
    session, before = tmp_path / "s", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        signal_in_call(patch, 2, signal.SIGINT)
        assert main(arguments(book, session)) == 130
    old = session.read_bytes()
    with monkeypatch.context() as patch:
        signal_in_call(patch, 1, signal.SIGINT)
        signal_in_call(patch, 1, signal.SIGINT)
        assert main(arguments(book, session)) == 130
    assert session.read_bytes() == old and b"an existing session file is as it was" in capfdbinary.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def reading(book, tmp_path, monkeypatch) -> Path:
    """A session stopped after two pieces."""
    with monkeypatch.context() as patch:
        signal_in_call(patch, 2)
        assert main(arguments(book, tmp_path / "s")) == 143
    return tmp_path / "s"


def test_another_prompt_is_refused_by_name(book, tmp_path, reading, capfdbinary):
    text, old = (book / "book").read_bytes(), reading.read_bytes()
    other, short, exact = tmp_path / "other", tmp_path / "short", tmp_path / "exact"
    other.write_bytes(text[:100] + b"!" + text[101:])
    short.write_bytes(text[:5000])
    exact.write_bytes(text[: 2 * PIECE])
    for path, words in [
        (other, "begins otherwise (sha256 "), (short, "ends after 5000 bytes"),
        (exact, f"ends after {2 * PIECE} bytes")
    ]:
        given = arguments(book, reading)
        given[given.index("--prompt-file") + 1] = str(path)
        capfdbinary.readouterr()
        assert main(given) == 2
        printed = capfdbinary.readouterr().err.decode()
        for word in (words, str(path), str(book / "book"), f"after reading {2 * PIECE} bytes", "--no-resume"):
            assert word in printed
    assert main(["generate", "--model", str(book / "model"), "--session", str(reading), "--quiet"]) == 2
    assert b"no prompt ends after 0 bytes" in capfdbinary.readouterr().err
    assert reading.read_bytes() == old


def test_a_prompt_that_has_grown_is_read_to_its_new_end(book, tmp_path, reading):
    (tmp_path / "grown").write_bytes((book / "book").read_bytes() + b"and more")
    given = arguments(book, reading)
    given[given.index("--prompt-file") + 1] = str(tmp_path / "grown")
    assert main(given) == 0
    assert hk.load_state(reading).pos == [N + 8 + 29] and load_note(reading) is None


def test_no_resume_and_finished_runs_read_a_new_text(book, reading, tmp_path, capfdbinary):
    short = tmp_path / "short"
    short.write_bytes(b"another text")
    given = arguments(book, reading, "--no-resume")
    given[given.index("--prompt-file") + 1] = str(short)
    assert main(given) == 0
    assert hk.load_state(reading).pos == [2 * PIECE + 12 + 29]
    # the run has ended: the same text once more, after the token that had not been read
    given.remove("--no-resume")
    assert main(given) == 0
    assert hk.load_state(reading).pos == [2 * PIECE + 2 * (12 + 29) + 1]


def test_a_session_stopped_while_writing_takes_another_prompt(book, tmp_path, monkeypatch, capfdbinary):
    given = [
        "generate", "--model", str(book / "model"), "--session", str(tmp_path / "s"), "--quiet",
        "--max-new-tokens", "9"
    ]
    with monkeypatch.context() as patch:
        signal_in_call(patch, 3)
        assert main([*given, "--prompt", "one"]) == 143
    assert load_note(tmp_path / "s")["written"] == 3
    assert main([*given, "--max-new-tokens", "3", "--prompt", "one"]) == 2
    assert b"stopped after writing 3 tokens" in capfdbinary.readouterr().err
    assert main([*given, "--prompt", "one more"]) == 0
    assert hk.load_state(tmp_path / "s").pos == [3 + 2 + 1 + 8 + 8]


def test_the_new_file_half_written_leaves_the_old_one_to_go_on_from(book, reading, monkeypatch, capfdbinary):
    """Power is lost while a later save is being written: its temporary file stays, the session is the last
    whole one."""
    (reading.parent / "s.abc.part").write_bytes(reading.read_bytes()[:1000])
    capfdbinary.readouterr()
    assert main(arguments(book, reading)) == 0
    assert capfdbinary.readouterr().out == (book / "out").read_bytes() and same_session(reading, book / "whole")
    reading.write_bytes(reading.read_bytes()[:1000])
    assert main(arguments(book, reading)) == 2
    assert b"is not a complete state file" in capfdbinary.readouterr().err


def test_a_note_is_for_whoever_writes_it(tmp_path):
    state = model().init_state(1)
    state.save(tmp_path / "with", {"a": [1, None, "x"]})
    state.save(tmp_path / "without")
    assert load_note(tmp_path / "with") == {"a": [1, None, "x"]} and load_note(tmp_path / "without") is None
    with pytest.raises(FileNotFoundError, match="load_note: no file"):
        load_note(tmp_path / "absent")


def run(book, session, tmp_path) -> int:
    (tmp_path / "short").write_bytes(b"abc")
    return main(arguments(book, session, "--prompt-file", str(tmp_path / "short"), "--max-new-tokens", "2"))


@pytest.mark.parametrize("note", [{"a": 1}, {"phase": "reading"}, [1], "x"])
def test_a_note_of_another_program_is_not_resumed(book, tmp_path, note):
    state = model().init_state(1)
    state.save(tmp_path / "session", note)
    assert run(book, tmp_path / "session", tmp_path) == 0
    assert load_note(tmp_path / "session") is None and hk.load_state(tmp_path / "session").pos == [4]


def test_sessions_that_cannot_be_are_refused_before_reading(book, tmp_path, capfdbinary):
    model().init_state(1).mixers[0].save(tmp_path / "layer")
    for session, what in (
        ("layer", b"holds a TitansState"), (".", b"is a folder"), ("absent/session", b"its folder does not exist")
    ):
        assert run(book, tmp_path / session, tmp_path) == 2
        out, err = capfdbinary.readouterr()
        assert what in err and not out


@pytest.mark.parametrize("ragged", [False, True])
def test_read_stops_after_a_piece_and_goes_on(ragged):
    m, text = model(), torch.randint(0, 256, (2, 2000))
    lengths = [2000, 1100] if ragged else None
    whole = read(m, text, lengths=lengths, learn="next_token", piece=256)
    asked = []
    first = read(
        m, text, lengths=lengths, learn="next_token", piece=256,
        should_stop=lambda: len(asked) == 3 or asked.append(0)
    )
    assert not first.finished and first.tokens == 768 and first.state.pos == [
        768, 768
    ] and whole.finished and whole.tokens == 2000
    rest = lengths and [1232, 332]
    second = read(m, text[:, 768:], first.state, rest, learn="next_token", piece=256, last=first.logits)
    assert torch.equal(second.logits, whole.logits)
    assert torch.equal(first.nats + second.nats, whole.nats) or torch.allclose(
        first.nats + second.nats, whole.nats, rtol=1e-14
    )
    assert [a + b for a, b in zip(first.predicted, second.predicted)] == whole.predicted
    assert all(torch.equal(a, b) for a, b in zip(second.state.tensors(), whole.state.tensors(), strict=True))


def test_read_takes_lengths_as_the_model_does():
    one, ids = model(), torch.randint(0, 256, (2, 90))
    a, b = read(one, ids, lengths=torch.tensor([90, 7])), read(one, ids, lengths=[90, 7])
    assert torch.equal(a.nats, b.nats) and a.state.pos == [90, 7]
    with pytest.raises(ValueError, match="read: argument lengths has 91 for row 1"):
        read(one, ids, lengths=[3, 91])
    assert read(one, ids[:0]).tokens == 0


def test_a_source_reads_like_the_tensor_it_gives():
    m, text = model(), torch.randint(0, 256, (1, 1000))
    prompt = Prompt(
        "p", io.BytesIO(bytes(text[0, 1:900].tolist())), bytes(text[0, 900:].tolist()), bytes(text[0, :1].tolist())
    )
    a, b = read(m, text, piece=256), read(m, prompt, piece=256, on_piece=lambda at, _: prompt.confirm(at))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.nats, b.nats) and b.tokens == 1000
    assert prompt.count == 999 and prompt.sha256 == hashlib.sha256(
        bytes(text[0, 1:].tolist())
    ).hexdigest() and not prompt.more
    assert model().generate(text, 5).tokens.tolist() == model().generate(iter_of(text), 5).tokens.tolist()
    nothing = read(m, Prompt("p"))
    assert nothing.logits is None and nothing.tokens == 0 and nothing.finished
    with pytest.raises(ValueError, match="empty prompt"):
        m.generate(Prompt("p"), 3)
    with pytest.raises(ValueError, match="argument lengths"):
        read(m, iter_of(text), lengths=[3])


def iter_of(ids: torch.Tensor):
    parts = iter(ids.split(1, 1))
    return lambda n: torch.cat([ids[:, :0], *itertools.islice(parts, n)], 1)


def grows(text: Path, use) -> int:
    """Bytes by which the peak with 16 times the text is above that with the text, after a first use."""
    peaks = []
    for size in (1, 1, 16):
        with open(text, "wb") as f:
            for _ in range(size * 8):
                f.write(bytes(range(128)) * 512)
        with PeakMemory(interval=0.002) as peak:
            use(text)
            peaks.append(peak.take())
    return peaks[2] - peaks[1]


def test_a_prompt_is_never_in_memory(tmp_path):
    def use(text: Path) -> None:
        with open(text, "rb") as f:
            prompt, at = Prompt("text", f), 0
            while n := prompt(PIECE).shape[1]:
                at += n
                prompt.confirm(at)
            assert prompt.count == os.path.getsize(text)

    assert grows(tmp_path / "text", use) < 2 * 2**20  # 7.5 MB more of text


@pytest.mark.slow
def test_memory_of_the_command_does_not_grow_with_the_prompt(tmp_path):
    torch.manual_seed(0)
    config = hk.HopeConfig(256, 8, 1, titans=hk.TitansConfig(8), cms=hk.CMSConfig(8, (64,), expansion=1.0))
    hk.HopeForCausalLM(config).save_pretrained(tmp_path / "m")

    def use(text: Path) -> None:
        command = ["generate", "--model", str(tmp_path / "m"), "--prompt-file", str(text), "--learn", "off"]
        assert main([*command, "--quiet", "--max-new-tokens", "1"]) == 0

    # 7.5 MB more of text: 127 MB as bytes, a list and a tensor of token ids
    assert grows(tmp_path / "text", use) < 16 * 2**20
