"""A run of benchmarks.gpu on a card, rehearsed without one: what it does with tests and cases that fail, hang
or die, what it writes, what it says. And that what a real run is made of exists."""

import json
import os
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from benchmarks import card, correctness, counters, gpu, plan, processes, timeline, wheels
from benchmarks import measure as m
from benchmarks.records import Results

MODULE = """
import json, os, time
from pathlib import Path
from benchmarks.script import Script

HERE = Path(__file__).parent
LOAD = '''
from tools import build_cuda as b
print("emulated, sources", b.hash_of(b.files(emulated=True)))
raise SystemExit
'''

def ok(ceilings):
    written = json.loads((HERE / "out" / "rehearsal" / "ops.json").read_text())["cases"]
    return {"ms": {"median": 1.0, "min": 1.0, "p90": 1.0, "n": 1}, "at": time.time(),
            "written": {name: record["status"] for name, record in written.items()}}

def case(name, call, backend):
    return "ops", name, {"kind": name, "backend": backend}, call

def parts(quick):
    return {
        "env": [("env", "machine", {}, lambda _: {})],
        "worth": [case("first", ok, "cuda"), case("hanging", lambda _: time.sleep(600), "cuda"),
                  case("after it", ok, "cuda"), case("dying", lambda _: os._exit(7), "triton"),
                  case("last", ok, "triton")],
        "sweeps": [case("more of cuda", ok, "cuda")], "peers": [],
    }

TESTS = {
    "cuda": ("test_a.py::test_good", "test_a.py::test_bad", "test_a.py::test_gone", "test_broken.py::test_x",
             "test_needs.py::test_x"),
    "triton": ("test_b.py::test_good", "test_b.py::test_dies", "test_b.py::test_after"),
}
SCRIPT = Script(
    device="cpu", folder=lambda: "rehearsal", parts=parts, tests=TESTS, sanitized="test_a.py::test_good",
    capability=lambda: 90, load=LOAD, compiled=("nothing",),
    root=HERE, case_seconds={"": 2.0},
)
"""
FILES = {
    "test_a.py": "import time\ndef test_good(): time.sleep(0.5)\ndef test_bad(): assert 'this' == 'that'\n",
    "test_b.py": "import os\ndef test_good(): pass\ndef test_dies(): os._exit(5)\ndef test_after(): pass\n",
    "test_broken.py": "def test_x(): pass\n1 / 0\n",
    "test_needs.py": "import unheard_of\ndef test_x(): pass\n",
}
TOOL = "#!/bin/sh\nsleep 1\necho '1 passed' $2\n"  # stands for compute-sanitizer


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(exit status, output, {section: cases}) of a run in which much goes wrong."""
    here = tmp_path_factory.mktemp("rehearsal")
    for name, text in {**FILES, "faulty_card.py": MODULE, "compute-sanitizer": TOOL}.items():
        (here / name).write_text(text)
    (here / "compute-sanitizer").chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(here), "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    command = (sys.executable, "-m", "benchmarks.gpu", "--rehearse", "faulty_card", "--commit", "given",
               "--out", str(here / "out"))
    done = subprocess.run(command, cwd=m.ROOT, env=env, capture_output=True, text=True, timeout=300)
    files = {p.stem: json.loads(p.read_text()) for p in (here / "out" / "rehearsal").glob("*.json")}
    assert set(files) == set(plan.SECTIONS), done.stdout + done.stderr
    return done.returncode, done.stdout, {section: data["cases"] for section, data in files.items()}


def test_it_ends_with_an_error_and_names_what_failed(rehearsed):
    status, said, _ = rehearsed
    end = said[said.index("== summary") :]
    assert status == 1 and len(end.splitlines()) <= 45 and "nothing failed" not in end
    for name in (
        "test_a.py::test_bad: AssertionError: assert 'this' == 'that'", "test_b.py::test_dies: pytest ends",
        "ops: hanging: took too long", "ops: dying: the process ended inside this case with status 7"
    ):
        assert name in end, end
    assert "cuda HANGS in ops: hanging: its other cases were skipped" in end


def test_a_hang_skips_a_backend_and_a_death_only_a_case(rehearsed):
    ops = rehearsed[2]["ops"]
    assert {name: record["status"] for name, record in ops.items()} == {
        "first": "ok", "hanging": "died", "after it": "skipped", "dying": "died", "last": "ok",
        "more of cuda": "skipped"
    }
    assert ops["more of cuda"]["reason"] == ops["after it"]["reason"] == "cuda hangs in ops: hanging"
    assert "Timeout (0:00:02)!" in ops["hanging"]["log"]  # where it was


def test_every_record_is_on_disk_before_the_next_case(rehearsed):
    ops = rehearsed[2]["ops"]
    assert ops["first"]["written"] == {"first": "started"}
    assert ops["last"]["written"] == {
        "first": "ok", "hanging": "died", "after it": "skipped", "dying": "died", "last": "started"
    }


def test_every_chosen_test_is_accounted_for(rehearsed):
    tests = rehearsed[2]["correctness"]
    assert {name: record["status"] for name, record in tests.items() if "::" in name} == {
        "test_a.py::test_good": "passed", "test_a.py::test_bad": "failed", "test_a.py::test_gone": "failed",
        "test_broken.py::test_x": "failed", "test_needs.py::test_x": "skipped",
        "test_b.py::test_good": "passed", "test_b.py::test_dies": "died", "test_b.py::test_after": "passed",
    }
    assert "there is no such test" in tests["test_a.py::test_gone"]["reason"]
    assert "ZeroDivisionError" in tests["test_broken.py::test_x"]["reason"]
    assert tests["test_needs.py::test_x"]["reason"] == "needs unheard_of"
    cuda = tests["pytest cuda"]
    assert cuda["status"] == "failed" and "ZeroDivisionError" in cuda["reason"]
    assert tests["pytest triton"]["died"] == 1 and tests["pytest triton"]["not run"] == []


def test_nothing_is_timed_while_tests_run(rehearsed):
    env, ops = rehearsed[2]["env"], rehearsed[2]["ops"]
    steps = env["timeline"]["steps"]
    assert [*steps] == [name for name in timeline.NAMES if name != "summary"]
    assert all(before[1] <= after[0] for before, after in zip(steps.values(), [*steps.values()][1:]))
    tools = rehearsed[2]["correctness"]
    assert all(tools[f"compute-sanitizer {tool}"]["status"] == "ok" for tool in ("memcheck", "racecheck"))
    assert tools["compute-sanitizer memcheck"]["log"] == "1 passed memcheck"
    seconds = ops["last"]["at"] - ops["first"]["at"]
    assert 2 <= seconds <= steps["worth"][1] - steps["worth"][0]
    assert env["precompiled"]["status"] == ("ok" if find_spec("triton") else "skipped")
    assert env["counters"]["status"] in ("skipped", "ok", "failed")


@pytest.mark.slow
def test_the_rehearsal_that_is_there_goes_through(tmp_path):
    """On the emulator and in Triton's interpreter."""
    command = (sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path))
    done = subprocess.run(command, cwd=m.ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0 and "nothing failed" in done.stdout, done.stdout + done.stderr
    ops = json.loads((tmp_path / "rehearsal" / "ops.json").read_text())["cases"]
    assert len(ops) == 3 and all(record["check"]["ok"] and record["ms"]["n"] for record in ops.values())


# -- what a real run is made of ------------------------------------------------------------------------------


def test_every_chosen_test_exists(tmp_path):
    chosen = [*card.CUDA_TESTS, *card.TRITON_TESTS]
    assert len(set(chosen)) == len(chosen)
    assert 35 <= len(card.CUDA_TESTS) <= 45 and 20 <= len(card.TRITON_TESTS) <= 30
    (tmp_path / "tests.json").write_text(json.dumps([*chosen, "tests/test_no.py::test_such"]))
    told = {"HOPE_KERNELS_TOLD": str(tmp_path), "HOPE_KERNELS_TOLD_LOG": str(tmp_path / "log")}
    env = processes.environment(told)
    files = dict.fromkeys(test.partition("::")[0] for test in chosen)
    command = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p",
               "benchmarks.told", *files)
    done = subprocess.run(command, cwd=m.ROOT, env=env, capture_output=True, text=True)
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert told[0]["absent"] == ["tests/test_no.py::test_such"] and len(told) == 1, done.stdout[-2000:]
    assert [line for line in done.stdout.splitlines() if "::" in line] == chosen  # and in this order


def test_bf16_comes_first_and_what_needs_an_emulated_gpu_is_not_chosen():
    kinds = ["bfloat16" in t or "dtype2" in t or "dtype23" in t or "momentum" in t for t in card.TRITON_TESTS]
    assert kinds == sorted(kinds, reverse=True) and sum(kinds) >= 15
    assert not any("few_blocks" in t or "kind_of_gpu" in t or "shared_memory" in t for t in card.CUDA_TESTS)


@pytest.mark.parametrize("minutes", [9, 5, 2])
def test_the_timeline_fits(minutes, capsys):
    assert gpu.main(["--plan", "--minutes", str(minutes)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "estimates" in lines[0] and float(lines[-1].split()[0]) <= 60 * minutes
    steps = [line for line in lines if any(f"  {name}: " in line for name in timeline.NAMES)]
    at = 0.0
    for line in steps:
        begins, takes, ends = map(float, line.split()[:3])
        assert abs(begins - at) <= 1 and takes >= 0 and begins + takes <= ends + 1
        at = begins + takes
    names = [name for name in plan.SECONDS if any(line.endswith(f" {name}") for line in lines)]
    at = [next(i for i, line in enumerate(lines) if line.endswith(f" {name}")) for name in names]
    assert at == sorted(at) and (minutes < 9 or len(names) == len(plan.WORTH))


def test_worth_is_in_the_order_that_was_asked_for():
    parts = plan.parts("cuda", False)
    assert [name for _, name, *_ in parts["worth"]] == list(plan.SECONDS)
    names = [case.name for _, case, _ in plan.WORTH]
    at = lambda *words: [i for i, name in enumerate(names) if all(word in name for word in words)]
    order = [at("prefill", "N256", "C64"), at("prefill", "N64", "C64"), at("prefill", "N64", "C16"),
             at("step graph"), at("refresh"), at("layer"), at("grad"), at("1.3B")]
    assert all(order) and [i for found in order for i in found] == list(range(len(names)))
    assert sum(plan.SECONDS.values()) <= timeline.STEPS[timeline.NAMES.index("worth")].end - 190
    assert list(parts) == ["env", "worth", "sweeps", "peers"]
    compiled = [name.startswith("compiled") for _, name, *_ in parts["peers"]]
    assert compiled.index(True) >= 8


def test_what_takes_too_long_is_put_off_at_the_expense_of_the_sweeps():
    clock = timeline.Clock(9, lambda text: None)
    assert clock.end("summary") - clock.began == 540
    before = {name: clock.end(name) for name in timeline.NAMES}
    clock.began -= 140  # a library that had to be built, say
    before = {name: end - 140 for name, end in before.items()}
    clock.shift()
    assert 99 <= clock.end("CUDA tests") - before["CUDA tests"] <= 101
    assert clock.end("worth") == before["counters"] and clock.end("peers") == before["peers"]
    with clock.step("worth"):
        raise RuntimeError("a fault of this program")
    assert "a fault of this program" in clock.errors["worth"] and "worth" in clock.record()["steps"]


def test_a_test_that_hangs_ends_the_backend(tmp_path):
    (tmp_path / "test_c.py").write_text(
        "import time\ndef test_hangs(): time.sleep(600)\ndef test_later(): pass\ndef test_latest(): pass\n")
    names = tuple(f"test_c.py::test_{name}" for name in ("hangs", "later", "latest"))
    script = SimpleNamespace(tests={"cuda": names}, root=tmp_path, variables={}, test_seconds={"cuda": 1.0})
    store = Results(None, {})
    began = time.time()
    assert correctness.tests(store, "cuda", script, 1, began + 60) == names[0] and time.time() < began + 30
    assert store.cases[names[0]]["status"] == "died"
    assert "hangs: took more than 1" in store.cases[names[0]]["reason"]
    assert {store.cases[name]["reason"] for name in names[1:]} == {f"cuda hangs in {names[0]}"}
    late = Results(None, {})
    assert correctness.tests(late, "cuda", script, 1, time.time() + 0.5) is None  # only the time was up
    assert list(late.cases) == ["pytest cuda"] and late.cases["pytest cuda"]["not run"] == list(names)


def test_a_collection_that_cannot_even_begin_is_told(tmp_path):
    (tmp_path / "conftest.py").write_text("raise RuntimeError('no conftest')\n")
    (tmp_path / "test_d.py").write_text("def test_x(): pass\n")
    tests = {"cuda": ("test_d.py::test_x",)}
    script = SimpleNamespace(tests=tests, root=tmp_path, variables={}, test_seconds={"cuda": 9})
    store = Results(None, {})
    assert correctness.tests(store, "cuda", script, 2, time.time() + 60) is None
    record = store.cases["pytest cuda"]
    assert record["status"] == "failed" and "no conftest" in record["reason"] and len(record["not run"]) == 1


def test_counters_are_read():
    busy = "smsp__issue_active.avg.pct_of_peak_sustained_active"
    stalled = "smsp__average_warps_issue_stalled_wait"
    rows = (["ID", "Kernel Name", busy, stalled, "dram"], ["", "", "%", "inst", "byte"],
            ["0", "titans_prefill", "37.5", "2.1", "7"])
    said = "\n".join(["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows)])
    assert counters.parsed(said) == {"titans_prefill": {busy: "37.5 %", stalled: "2.1 inst"}}
    assert counters.parsed("==ERROR== nothing") == {}


def test_wheels_are_unpacked_and_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "a_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer.py", "value = 5\n")
        wheel.writestr("a_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\n")
    assert wheels.use(tmp_path, tmp_path / "into") == ["a_peer-1.0-py3-none-any.whl"]
    code = "import a_peer, importlib.metadata as found; print(a_peer.value, found.version('a-peer'))"
    env = os.environ | wheels.variables(tmp_path / "into")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "5 1.0\n"
    assert wheels.use(tmp_path / "none", tmp_path / "into") == []


@pytest.mark.parametrize("arch", [90])
def test_what_is_compiled_ahead_has_the_key_of_the_row_that_is_launched(arch, tmp_path):
    """The binder's key, through the whole call, is that of the compile report's row for the same layer."""
    pytest.importorskip("triton")
    code = f"""
import sys, time, torch, triton
from benchmarks import precompile
from benchmarks.precompile import compile_only
from hope_kernels.ops.titans.triton import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
triton.knobs.cache.dir = sys.argv[1]
case = precompile.T("prefill", C=16, D=32, N=32, H=2)
(spec,) = tiles._specializations(case.config, "bf16", "", ({arch},))
signature, constexprs, attrs = spec.source()
source = ASTSource(fn=spec.fn, signature=signature, constexprs=constexprs, attrs=attrs)
options = {{"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.maxnreg}}
ahead = triton.compile(source, target=GPUTarget("cuda", {arch}, 32), options=options).hash
for T in (1, 33):
    with compile_only({arch}) as found:
        precompile.memory(case)
    assert found == {{"scan_kernel": ahead}}, (found, ahead)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=m.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
