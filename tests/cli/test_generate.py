"""The command with inputs, outputs and arguments of every kind: nothing read is lost, and whatever is wrong
is one line."""

import contextlib
import fcntl
import io
import os
import pty
import signal
import stat
import subprocess
import sys
import termios
import threading

import pytest
import torch
from interrupted import at_call
from small_model import saved

import hope_kernels as hk
from hope_kernels.cli.lock import held
from hope_kernels.cli.main import main
from hope_kernels.cli.terminal import Output
from hope_kernels.state_file import load_note

TEXT = b"In the beginning was the Word, and the Word was with God, and the Word was God."
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder):
    """What a run writes that nothing disturbs, and its state."""
    out = hk.HopeForCausalLM.from_pretrained(folder).generate(
        torch.tensor([list(TEXT)]), NEW, temperature=0.9, seed=5
    )
    return bytes(out.tokens[0].tolist()), out.state


@pytest.fixture(autouse=True)
def _bytes(capfdbinary):
    """What these models write is no text."""


def arguments(folder, *more, session=None) -> list[str]:
    given = ["generate", "--model", str(folder), "--quiet", "--temperature", "0.9", "--seed", "5",
             "--max-new-tokens", str(NEW),
             "--prompt", TEXT.decode()]
    return [*given, *([] if session is None else ["--session", str(session)]), *map(str, more)]


def equal(path, state) -> bool:
    found = hk.load_state(path)
    return (
        all(torch.equal(a, b) for a, b in zip(found.tensors(), state.tensors(), strict=True))
        and found.pos == state.pos
    )


def one_line(printed: bytes, *words: str) -> None:
    text = printed.decode()
    assert text.startswith("hope_kernels: ") and text.count("\n") == 1 and "Traceback" not in text, text
    for word in words:
        assert word in text, text


# -- outputs -------------------------------------------------------------------------------------------------


def output_lost(monkeypatch, kind: str, call: int):
    """Standard output that takes no more as call ``call`` of the model begins; what it had taken comes back
    from the function given."""
    if kind == "full":
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
        return lambda: b""
    r, w = os.pipe()
    got = []
    monkeypatch.setattr(sys, "stdout", open(w, "w"))
    at_call(monkeypatch, call, lambda: (call > 1 and got.append(os.read(r, 99)), os.close(r)))
    return lambda: b"".join(got)


@pytest.mark.parametrize(("kind", "call"), [("full", 1), ("pipe", 1), ("pipe", 4), ("pipe", NEW)])
def test_an_output_that_takes_no_more_loses_nothing(folder, whole, tmp_path, monkeypatch, capfdbinary, kind, call):
    """The session is kept, and the same command goes on with the byte that did not go out."""
    given, session = arguments(folder, session=tmp_path / "s"), tmp_path / "s"
    with monkeypatch.context() as patch:
        taken = output_lost(patch, kind, call)
        assert main(given) == (2 if kind == "full" else 141)
    assert taken() == whole[0][: call - 1]
    one_line(capfdbinary.readouterr().err,
             "standard output: " + ("No space left" if kind == "full" else "Broken pipe"),
             f"after reading {len(TEXT)} bytes",
             f"writing {call - 1}; session in {session}, the same command goes on")
    note = load_note(session)
    assert (note["phase"], note["written"], note["unsent"]) == ("writing", call - 1, True)
    with monkeypatch.context() as patch:  # again: nothing is written twice, or skipped
        output_lost(patch, "full", 1)
        assert main(given) == 2 and load_note(session) == note
    capfdbinary.readouterr()
    assert main(given) == 0
    assert taken() + capfdbinary.readouterr().out == whole[0] + b"\n"
    assert equal(session, whole[1]) and load_note(session) is None


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_without_a_session_it_is_one_line(folder, monkeypatch, capfdbinary, kind):
    output_lost(monkeypatch, kind, 3)
    assert main(arguments(folder)) == (2 if kind == "full" else 141)
    one_line(capfdbinary.readouterr().err, "standard output: ")


def test_a_closed_standard_output_is_seen_before_anything_is_read(folder, tmp_path, monkeypatch, capfdbinary):
    for closed in (None, open(os.devnull, "w")):
        if closed is not None:
            closed.close()
        monkeypatch.setattr(sys, "stdout", closed)
        for given in (arguments(folder, session=tmp_path / "s"), ["doctor"], ["demo"]):
            assert main(given) == 2
            one_line(capfdbinary.readouterr().err, "standard output is closed")
    assert os.listdir(tmp_path) == []
    assert main(arguments(folder, "--max-new-tokens", 0, session=tmp_path / "s")) == 0  # writes nothing


@pytest.mark.parametrize("error", [None, "/dev/full"])
def test_what_cannot_be_said_on_standard_error_stops_nothing(
    folder, whole, tmp_path, monkeypatch, capfdbinary, error
):
    monkeypatch.setattr(sys, "stderr", None if error is None else open(error, "w"))
    given = [a for a in arguments(folder, session=tmp_path / "s") if a != "--quiet"]
    assert main(given) == 0
    assert capfdbinary.readouterr().out == whole[0] + b"\n" and equal(tmp_path / "s", whole[1])
    assert main(arguments(folder, "--session", ".")) == 2
    monkeypatch.undo()


def seen_by(master: int) -> bytes:
    """All that a terminal got, once nobody writes to it any more."""
    found = b""
    with contextlib.suppress(OSError):
        while part := os.read(master, 9999):
            found += part
    os.close(master)
    return found


def shown(pieces: list[bytes]) -> bytes:
    """What a terminal gets of these bytes."""
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    with open(slave, "w", encoding="utf-8") as terminal:
        output = Output(terminal)
        for piece in pieces:
            output.write(piece)
        output.write(b"", final=True)
    return seen_by(master)


def test_a_terminal_gets_text():
    assert shown([b"a\tb\n", b"\xc3", b"\xa9 ", "日".encode()[:2], "日".encode()[2:]]) == "a\tb\né 日".encode()
    assert shown([b"\x1b]0;title\x07"]) == rb"\x1b]0;title\x07"
    assert shown([b"\r\x08\x7f\x00"]) == rb"\r\x08\x7f\x00"
    # control characters of eight bits, bare and as UTF-8
    assert shown([b"\x9b2J", b"\xc2\x9b2J"]) == rb"\x9b2J\x9b2J"
    assert shown(["\u202e\u200b\ufeff".encode()]) == rb"\u202e\u200b\ufeff"
    assert shown([b"\xc3", b"(", b"\xe6\x97"]) == rb"\xc3(\xe6\x97"
    every = shown([bytes([b]) for b in range(256)])
    assert all(32 <= b < 127 or b in b"\n\t" for b in every)


def test_only_a_terminal_gets_escapes(folder, tmp_path, monkeypatch, capfdbinary, whole):
    assert any(b < 32 or b > 126 for b in whole[0])
    master, slave = pty.openpty()
    with monkeypatch.context() as patch:
        with open(slave, "w", encoding="utf-8") as terminal:
            patch.setattr(sys, "stdout", terminal)
            assert main(arguments(folder)) == 0
    seen = seen_by(master).decode()
    assert all(c.isprintable() or c in "\r\n\t" for c in seen) and "\\x" in seen
    assert main(arguments(folder)) == 0
    assert capfdbinary.readouterr().out == whole[0] + b"\n"


# -- inputs --------------------------------------------------------------------------------------------------


class Breaking(io.RawIOBase):
    """A pipe or network file that fails after its first bytes."""

    def __init__(self, data: bytes):
        self.data = data

    def readable(self):
        return True

    def readinto(self, into):
        part, self.data = self.data[: len(into)], self.data[len(into) :]
        if not part:
            raise OSError(5, "Input/output error")
        into[: len(part)] = part
        return len(part)


def test_an_input_that_breaks_off_keeps_what_was_read(folder, tmp_path, monkeypatch, capfdbinary):
    text = bytes(torch.randint(97, 123, (3 * 4096 + 100,), generator=torch.Generator().manual_seed(0)).tolist())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Breaking(text))))
    given = ["generate", "--model", str(folder), "--quiet", "--temperature", "0", "--max-new-tokens", "3",
             "--prompt-file", "-",
             "--learn", "off", "--session", str(tmp_path / "s")]
    assert main(given) == 2
    one_line(capfdbinary.readouterr().err, "standard input: Input/output error", "after reading 8192 bytes")
    assert hk.load_state(tmp_path / "s").pos == [8192]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(given) == 0
    straight = hk.HopeForCausalLM.from_pretrained(folder).generate(torch.tensor([list(text)]), 3, learn="off")
    assert capfdbinary.readouterr().out == bytes(straight.tokens[0].tolist()) + b"\n" and equal(
        tmp_path / "s", straight.state
    )


def test_a_closed_standard_input_is_one_line(folder, monkeypatch, capfdbinary):
    for closed in (None, open(os.devnull)):
        if closed is not None:
            closed.close()
        monkeypatch.setattr(sys, "stdin", closed)
        assert main(arguments(folder, "--prompt-file", "-")) == 2
        one_line(capfdbinary.readouterr().err, "standard input is closed")
        assert main(arguments(folder)) == 0  # not needed
        capfdbinary.readouterr()


@pytest.mark.slow
def test_a_process_without_standard_files(folder, tmp_path):
    """Files opened later do not become standard error: a message would be written into them."""
    run = f"{sys.executable} -m hope_kernels generate --model {folder} --prompt abc --max-new-tokens 2"
    run += f" --session {tmp_path / 's'}"
    done = subprocess.run(["bash", "-c", f"{run} <&- >&- 2>{tmp_path / 'err'}"])
    assert done.returncode == 2
    one_line((tmp_path / "err").read_bytes(), "standard output is closed")
    done = subprocess.run(["bash", "-c", f"{run} <&- >{tmp_path / 'out'} 2>&-"])
    assert done.returncode == 0 and len((tmp_path / "out").read_bytes()) == 3
    assert hk.load_state(tmp_path / "s").pos == [4]
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m hope_kernels doctor > /dev/full 2>{tmp_path / 'err'}"]
    )
    assert done.returncode == 2
    one_line((tmp_path / "err").read_bytes(), "No space left")


# -- sessions ------------------------------------------------------------------------------------------------


def test_links_are_followed_and_stay(folder, whole, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "s")  # of nothing yet
    (tmp_path / "second").symlink_to("link")
    assert main(arguments(folder, session=tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and equal(tmp_path / "far" / "s", whole[1])
    assert main(
        ["generate", "--model", str(folder), "--quiet", "--max-new-tokens", "2", "--session",
            str(tmp_path / "second")]
    ) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink() and not (
        tmp_path / "far" / "s"
    ).is_symlink()
    assert hk.load_state(tmp_path / "far" / "s").pos == [len(TEXT) + NEW + 1]
    assert os.listdir(tmp_path / "far") == ["s"]


def test_sessions_that_are_no_files_are_refused_at_once(folder, tmp_path, capfdbinary):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name, words in (("pipe", "no regular file"), ("to-pipe", "no regular file"), ("circle", "no regular file"),
                        ("/dev/null", "no regular file"), (".", "is a folder"),
                        ("absent/s", "its folder does not exist")):
        assert main(arguments(folder, session=tmp_path / name)) == 2
        one_line(capfdbinary.readouterr().err, f"session {tmp_path / name}", words)
    assert main(arguments(folder, "--session", "")) == 2
    one_line(capfdbinary.readouterr().err, "--session is empty")


def test_a_folder_that_cannot_be_written_is_refused_at_once(folder, capfdbinary):
    assert main(arguments(folder, session="/proc/s")) == 2
    one_line(capfdbinary.readouterr().err, "session /proc/s cannot be written there")


def test_a_new_session_is_its_owners(folder, tmp_path):
    before = os.umask(0o022)
    try:
        assert main(arguments(folder, session=tmp_path / "s")) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


LOCKER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, f"{os.getpid()}\\n".encode())
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_process_per_session(folder, whole, tmp_path, capfdbinary):
    """The second one says so before it reads anything; a killed one holds nothing."""
    session = tmp_path / "s"
    (tmp_path / "link").symlink_to(session)
    other = subprocess.Popen(
        [sys.executable, "-c", LOCKER, f"{session}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    for name in (session, tmp_path / "link"):
        assert main(arguments(folder, session=name)) == 2
        one_line(capfdbinary.readouterr().err, f"session {name} is in use by another process (pid {other.pid})")
    assert not session.exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "s.lock").exists()
    assert main(arguments(folder, session=session)) == 0
    assert equal(session, whole[1]) and sorted(os.listdir(tmp_path)) == ["link", "s"]


def test_a_lock_is_held_for_the_whole_run_and_by_one_only(folder, tmp_path, monkeypatch, capfdbinary):
    second = []
    at_call(monkeypatch, 3, lambda: second.append(main(arguments(folder, session=tmp_path / "s"))))
    assert main(arguments(folder, session=tmp_path / "s")) == 0
    assert second == [2] and b"in use by another process" in capfdbinary.readouterr().err
    # of many that want it at once, over and over, with the file coming and going
    path, inside, most, taken = str(tmp_path / "t"), [], [], []

    def work() -> None:
        for _ in range(300):
            try:
                with held(path, "t"):
                    inside.append(0)
                    most.append(len(inside))
                    inside.pop()
                taken.append(0)
            except BlockingIOError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(most) == 1 and taken and not os.path.exists(path + ".lock")


def test_where_there_are_no_locks_a_run_says_so_and_goes_on(folder, tmp_path, monkeypatch, capfdbinary):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert main(arguments(folder, session=tmp_path / "s")) == 0
    one_line(capfdbinary.readouterr().err, "is not locked (Operation not supported)")
    assert os.listdir(tmp_path) == ["s"]


def test_reading_alone(folder, tmp_path, capfdbinary):
    """--max-new-tokens 0: the text is read and kept, and a later run writes on after what follows."""
    session = tmp_path / "s"
    assert main(arguments(folder, "--max-new-tokens", 0, session=session)) == 0
    assert capfdbinary.readouterr() == (b"", b"") and hk.load_state(session).pos == [
        len(TEXT)
    ] and load_note(session) is None
    assert main([*arguments(folder, session=session)[:-4], "--prompt", "And", "--session", str(session)]) == 0
    straight = hk.HopeForCausalLM.from_pretrained(folder).generate(
        torch.tensor([[*TEXT, *b"And"]]), NEW, temperature=0.9, seed=5
    )
    assert capfdbinary.readouterr().out[:-1] == bytes(straight.tokens[0].tolist())
    assert main(["generate", "--model", str(folder), "--quiet", "--max-new-tokens", "0"]) == 2
    one_line(capfdbinary.readouterr().err, "empty prompt")


def test_reading_alone_reads_the_last_token_written(folder, whole, tmp_path):
    assert main(arguments(folder, session=tmp_path / "s")) == 0
    assert main(arguments(folder, "--max-new-tokens", 0, session=tmp_path / "s")) == 0
    assert hk.load_state(tmp_path / "s").pos == [len(TEXT) + NEW + len(TEXT)]


@pytest.mark.parametrize("call", range(2, 8))
def test_a_stop_is_found_across_an_interruption(folder, whole, tmp_path, monkeypatch, capfdbinary, call):
    stop = whole[0][2:6]
    n = whole[0].index(stop) + 4
    given = arguments(folder, session=tmp_path / "s")
    monkeypatch.setattr(sys, "argv", [])
    stops = ["--stop", stop.decode("utf-8", "surrogateescape")]
    with monkeypatch.context() as patch:
        at_call(patch, call, lambda: signal.raise_signal(signal.SIGTERM))
        code = main([*given, *stops])
    assert code == (143 if call < n else 0)
    assert code == 0 or main([*given, *stops]) == 0
    assert capfdbinary.readouterr().out.replace(b"\n", b"") == whole[0][:n].replace(b"\n", b"")
    assert load_note(tmp_path / "s") is None


# -- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "words"), [
    (["--device", "nonsense"], "argument --device is 'nonsense', which cannot be used here"),
    (["--device", "meta"], "'meta'"), (["--device", "cuda:99"], "'cuda:99'"), (["--device", ""], "--device"),
    (["--max-new-tokens", "-1"], "argument --max-new-tokens is -1"),
    (["--temperature", "nan"], "argument temperature is nan"),
    (["--temperature=-1"], "argument temperature is -1.0"),
    (["--top-k", "0"], "argument top_k is 0"), (["--top-p", "nan"], "argument top_p is nan"),
    (["--top-p", "1.5"], "argument top_p is 1.5"),
    (["--stop", ""], "argument stop has an empty entry"), (["--save-every", "nan"], "--save-every is nan"),
    (["--save-every=-1"], "--save-every is -1"), (["--prompt", ""], "empty prompt"),
    (["--backend", "nonsense"], "unknown backend"),
    (["--model", ""], "No such file"), (["--model", "/dev/null"], "neither a folder nor a bundled model"),
    (["--prompt-file", "/"], "Is a directory"),
])
def test_arguments_are_refused_in_one_line(folder, tmp_path, capfdbinary, more, words):
    assert main(arguments(folder, *more, session=tmp_path / "s")) == 2
    one_line(capfdbinary.readouterr().err, words)
    assert os.listdir(tmp_path) == []


def test_arguments_that_are_odd_and_fine(folder, tmp_path, capfdbinary):
    for more in (["--temperature", "inf"], ["--temperature", "1e-308"], ["--top-k", "9" * 30],
                 ["--seed", "9" * 30], ["--seed=-2"],
                 ["--save-every", "inf"], ["--stop", "never to be found"],
                 ["--prompt", b"\xff\xfe".decode("utf-8", "surrogateescape")]):
        assert main(arguments(folder, *more, session=tmp_path / more[0])) == 0, more
    assert main(arguments(folder, "--max-new-tokens", "9" * 30, "--stop", "\x00", "--temperature", "inf")) == 0
    assert hk.load_state(tmp_path / "--prompt").pos == [2 + NEW - 1]


def test_the_demo_refuses_what_is_too_short(capfdbinary):
    for count in ("-5", "0", "1", "4000"):
        assert main(["demo", f"--bytes={count}"]) == 2
        one_line(capfdbinary.readouterr().err, "argument --bytes is", "expected at least 4096")


NOTE = {"phase": "writing", "prompt": "p", "bytes": 0, "sha256": "", "written": 0}


@pytest.mark.parametrize("change", [
    {"bytes": "many"}, {"bytes": -1}, {"written": "x"}, {"written": None}, {"phase": "x"}, {"phase": None},
    {"prompt": None}, {"tail": "zz"}, {"tail": 5},
], ids=str)
def test_notes_that_no_run_has_left_are_no_notes(folder, tmp_path, change):
    hk.HopeForCausalLM.from_pretrained(folder).init_state(1).save(tmp_path / "s", NOTE | change)
    assert main(arguments(folder, session=tmp_path / "s")) == 0
    assert hk.load_state(tmp_path / "s").pos == [len(TEXT) + NEW - 1]
