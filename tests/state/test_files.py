"""Files of states: written whole or not at all, as private as they were, and refused by ValueError where a
bit of them is wrong."""

import copy
import errno
import json
import os
import random
import signal
import stat
import struct
import threading
import time

import pytest
import torch
from safetensors.torch import load, save

import hope_kernels as hk
from hope_kernels import files, load_state
from hope_kernels.files import write_atomically
from hope_kernels.layers.attention import CausalAttention
from hope_kernels.state_file import load_note

D, V = 8, 16
POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions and locks of POSIX")


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@POSIX
def test_permissions(tmp_path):
    state = hk.SelfModifyingTitans(hk.TitansConfig(D)).init_state(1)
    state.save(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o600
    for kept in (0o600, 0o640, 0o644, 0o666, 0o400):
        os.chmod(tmp_path / "new", kept)
        state.save(tmp_path / "new")
        assert mode(tmp_path / "new") == kept
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "plain", b"a")
        assert mode(tmp_path / "plain") == 0o640
    finally:
        os.umask(old)


@POSIX
def test_the_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda *_: pytest.fail("umask was set"))
    write_atomically(tmp_path / "a", b"a")
    write_atomically(tmp_path / "a", b"b")


@pytest.mark.parametrize("failing", ["open", "fsync"])
def test_after_the_rename_nothing_is_raised(tmp_path, monkeypatch, failing):
    """A folder that cannot be opened or synced: the new file is in its place, so an error would be wrong."""
    path, real = tmp_path / "a", getattr(os, failing)
    path.write_bytes(b"old")

    def refuse(what, *args, **options):
        folder = what == os.path.realpath(tmp_path) if failing == "open" else stat.S_ISDIR(os.fstat(what).st_mode)
        if folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(what, *args, **options)

    monkeypatch.setattr(os, failing, refuse)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("rename"), replace(*a)))
    monkeypatch.setattr(
        os, "fsync", lambda f: (done.append("folder" if stat.S_ISDIR(os.fstat(f).st_mode) else "file"), fsync(f))
    )
    write_atomically(tmp_path / "a", b"new")
    assert done == ["file", "rename", "folder"]


@POSIX
def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_atomically(tmp_path / "link", b"first")  # the file need not be there yet
    write_atomically(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_bytes() == b"second"


@POSIX
def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    state = hk.SelfModifyingTitans(hk.TitansConfig(D)).init_state(1)
    for path in (tmp_path / "pipe", tmp_path / "folder"):
        with pytest.raises(ValueError, match="no regular file"):
            state.save(path)
        with pytest.raises(ValueError, match="expected a file"):
            load_state(path)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@POSIX
def test_what_killed_writers_left_is_swept_and_living_ones_are_not(tmp_path):
    # the second as earlier versions named theirs
    dead = [tmp_path / "s.0a1b2c3d.part", tmp_path / "s.abc_d3fg.part"]
    others = [tmp_path / "s.part", tmp_path / "other.0a1b2c3d.part", tmp_path / "s.0a1b2c3d.part.keep"]
    for path in (*dead, *others):
        path.write_bytes(b"x")
    handle, living = files._temporary(str(tmp_path / "s"), 0o600)
    try:
        write_atomically(tmp_path / "s", b"new")
        assert os.path.exists(living) and all(p.exists() for p in others) and not any(p.exists() for p in dead)
    finally:
        os.close(handle)
    write_atomically(tmp_path / "s", b"newer")
    assert not os.path.exists(living)


@POSIX
def test_many_writers_of_one_file(tmp_path):
    """Every reader sees one whole version, and no writer takes another's temporary file for a dead one's."""
    path, failures, stop = tmp_path / "s", [], time.monotonic() + 1.0

    def write(n: int) -> None:
        while time.monotonic() < stop:
            try:
                write_atomically(path, bytes([n]) * 10_000)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    while time.monotonic() < stop:
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 10_000 and len(set(data)) == 1
    for t in threads:
        t.join()
    assert not failures and os.listdir(tmp_path) == ["s"]


def killed_while_saving(path, kills: int, seed: int) -> int:
    """Kills ``kills`` processes that save without end; how many left a temporary file behind. What is there
    always loads whole."""
    layer = hk.SelfModifyingTitans(hk.TitansConfig(64, 2))
    state, draw, behind = layer.init_state(4), random.Random(seed), 0
    state.save(path)
    for _ in range(kills):
        child = os.fork()
        if not child:
            try:
                while True:
                    state.delta2.add_(1)
                    state.save(path)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        behind += len(os.listdir(os.path.dirname(path))) - 1
        found = load_state(path)  # whole: its hash is checked
        assert found.delta2.unique().numel() == 1
        state.save(path)
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    return behind


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, kills):
    behind = killed_while_saving(str(tmp_path / "s"), kills, 3)
    print(kills, "kills while saving:", behind, "left a temporary file, none a torn one")
    assert behind >= kills // 10


def states() -> dict:
    torch.manual_seed(0)
    titans = hk.TitansConfig(D, 1, chunk_memory=4, chunk_other=4)
    cms = hk.CMSConfig(D, (4, 8), expansion=1.0, lr=0.01, optimizer="momentum")
    made = {}
    with torch.no_grad():
        layer = hk.SelfModifyingTitans(titans)
        made["titans"] = layer, torch.randn(2, 3, D), layer(torch.randn(2, 9, D), lengths=[9, 5])[1]
        layer = CausalAttention(hk.HopeConfig(V, D, 1, "attention", window=6))
        made["attention"] = layer, torch.randn(2, 3, D), layer(torch.randn(2, 9, D), lengths=[9, 5])[1]
        layer = hk.ContinuumMemory(cms)
        y, state = layer(torch.randn(2, 4, D))
        made["cms"] = layer, torch.randn(2, 3, D), layer(torch.randn(2, 1, D), layer.refresh(state, y))[1]
        for mixer in ("self_modifying", "attention"):
            config = hk.HopeConfig(V, D, 2, mixer, titans=titans if mixer == "self_modifying" else None, cms=cms)
            model = hk.HopeForCausalLM(config).eval()
            ids = torch.randint(0, V, (2, 9))
            made[mixer] = model, ids[:, :3], model(ids, lengths=[9, 5], learn="next_token")[1]
    return made


def test_a_loaded_state_lives_in_memory_of_its_own(tmp_path):
    for name, (module, x, state) in states().items():
        path = tmp_path / name
        state.save(path)
        loaded, again = load_state(path), load_state(path)
        os.truncate(path, 100)
        path.write_bytes(b"\xff" * 200_000)
        assert all(torch.equal(a, b) for a, b in zip(loaded.tensors(), again.tensors()))
        with torch.no_grad():
            assert torch.equal(module(x, loaded)[0], module(x, again)[0])


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    generator, path = random.Random(1), tmp_path / "s"
    _, _, state = states()["self_modifying"]
    state.save(path, note={"phase": "reading"})
    data = path.read_bytes()
    for _ in range(150):
        at = generator.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :])
        try:
            loaded = load_state(path)
        except ValueError:
            continue
        assert loaded.pos == state.pos and all(
            torch.equal(a, b) for a, b in zip(loaded.tensors(), state.tensors(), strict=True)
        )


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5, ""])
def test_a_device_that_is_none(tmp_path, device):
    hk.SelfModifyingTitans(hk.TitansConfig(D)).init_state(1).save(tmp_path / "s")
    with pytest.raises(ValueError, match="load_state: argument device is"):
        load_state(tmp_path / "s", device)


HOSTILE = [None, True, False, -1, 0, 1, 2, 3, 4, 5, 9, 2**31, 2**63, 2**64, -(2**63), 1e308, float("nan"),
           float("inf"), "", "x", "s.k",
           [], {}, [[]], [0], [1, 1], [9, 5], [-5, 5], [True, 9], [9, 5.0], {"value": 1}, {"list": []},
           {"dict": {}}, {"counters": [9, 5]},
           {"tensor": "s.pending_k"}, {"tensor": "absent"}, {"state": "TitansState", "fields": {}},
           {"config": "CMSConfig", "fields": {}}]


def places(node, found: list) -> list:
    """(container, key) of everything in a JSON tree."""
    for key in range(len(node)) if isinstance(node, list) else list(node) if isinstance(node, dict) else ():
        found.append((node, key))
        places(node[key], found)
    return found


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file like ``data``, damaged: in its bytes with its hash left, or in what it says with the hash taken
    out."""
    kind = draw.randrange(8)
    if kind < 2:
        data = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data) if kind else min(len(data), 3000))] = draw.randrange(256)
        return bytes(data)
    if kind == 2:
        return data[: draw.randrange(len(data))] + draw.choice([b"", b"\0" * 64, data[: draw.randrange(64)]])
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    meta = header.pop("__metadata__")
    meta.pop("sha256", None)
    if kind == 3:  # the header: names, dtypes, shapes, offsets
        node, key = draw.choice(places(header, []))
        node[key] = draw.choice(HOSTILE)
        text = json.dumps(header | {"__metadata__": meta}).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    tensors, tree = load(data), json.loads(meta["tree"])
    if kind == 4:  # tensors of other shapes, dtypes, values
        name = draw.choice(sorted(tensors))
        t = tensors[name]
        tensors[name] = draw.choice([
            lambda: t[:1], lambda: torch.cat([t, t]), lambda: t.reshape(-1), lambda: t.double(),
            lambda: t.half(), lambda: t.long(),
            lambda: torch.zeros(1, 1, 1, 1), lambda: t + 1, lambda: t * float("nan"), lambda: t[..., :0],
            lambda: t.unsqueeze(0),
            lambda: torch.zeros([64] + list(t.shape[1:]), dtype=t.dtype), lambda: -t, lambda: t.flip(0),
            lambda: torch.full_like(t, 2**40 if t.dtype == torch.int64 else 1e38),
        ])().contiguous()
    for _ in range(draw.choice([1, 1, 2]) if kind > 4 else 0):
        node, key = draw.choice(places(tree, []))
        other, name = draw.choice(places(tree, []))
        node[key] = copy.deepcopy(other[name] if draw.random() < 0.3 else draw.choice(HOSTILE))
    return save(tensors, meta | {"tree": json.dumps(tree)})


def fuzz(path, count: int, seed: int, read_on: bool = True) -> dict[str, int]:
    """Loads ``count`` damaged files and reads on with what loads; how many were refused, loaded, and refused
    by the call."""
    made, draw, found = states(), random.Random(seed), {"refused": 0, "loaded": 0, "not read": 0}
    for name, (_, _, state) in made.items():
        state.save(f"{path}.{name}", note={"phase": "reading"})
    originals = {name: open(f"{path}.{name}", "rb").read() for name in made}
    for _ in range(count):
        name = draw.choice(sorted(made))
        with open(path, "wb") as f:
            f.write(mutated(originals[name], draw))
        try:
            state = load_state(path)
        except ValueError:
            found["refused"] += 1
            continue
        found["loaded"] += 1
        module, x, original = made[name]
        if not read_on or type(state) is not type(original) or state.batch != 2:
            continue
        state.fingerprint = None
        try:
            with torch.no_grad():
                module(x, state)
        except ValueError:
            found["not read"] += 1
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files(tmp_path, seed):
    found = fuzz(tmp_path / "s", 300, seed)
    assert found["refused"] > 100 and found["loaded"] > 3


@pytest.mark.slow
def test_very_many_damaged_files(tmp_path):
    count = int(os.environ.get("HOPE_KERNELS_TEST_FILES", 10_000))
    found = fuzz(tmp_path / "s", count, 7)
    print(count, "damaged files:", found)
    assert found["refused"] > count / 2


DEEP = ['{"list":[' * 50_000 + "1" + "]}" * 50_000, "[" * 100_000]


@pytest.mark.parametrize("tree", [*DEEP, "1", "null", '"x"', "[]", "{}", '{"value": 3}', ""])
def test_a_tree_that_is_none(tmp_path, tree):
    meta = {"format": "hope_kernels.state", "version": "1", "fingerprint": "", "tree": tree, "note": tree}
    (tmp_path / "s").write_bytes(save({}, meta))
    with pytest.raises(ValueError, match="is not a complete state file"):
        load_state(tmp_path / "s")
    if tree in (*DEEP, ""):
        with pytest.raises(ValueError, match="is not a complete state file"):
            load_note(tmp_path / "s")
