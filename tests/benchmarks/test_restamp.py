"""Carrying results over a change that left them as they were: only what was current, and was not measured
since."""

import json
import shutil
import subprocess

import pytest

from benchmarks import restamp, sources

OURS, OTHER = {"kind": "gate", "backend": "chunked"}, {"kind": "prefill", "backend": "chunked"}
FILE = "benchmarks/results/cpu.json"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose first commit has current results and older ones; since then the output gate has
    changed."""
    root = tmp_path_factory.mktemp("repository")
    left_out = shutil.ignore_patterns("assets", "*.so", "__pycache__", "results")
    for folder in ("hope_kernels", "benchmarks", "csrc", "tools"):
        shutil.copytree(sources.ROOT / folder, root / folder, ignore=left_out)
    shutil.copy(sources.ROOT / "setup.py", root / "setup.py")
    of = sources.kernel_hash
    record = lambda case, ms, **more: {"status": "ok", "ms": ms, "case": case, "kernel": of(case)} | more
    data = {"stamp": {}, "cases": {"kept": record(OURS, 1), "old": record(OURS, 2, kernel="0" * 16),
                                   "anew": record(OURS, 3), "other": record(OTHER, 4)}}
    (root / FILE).parent.mkdir()
    (root / FILE).write_text(json.dumps(data))
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "first")):
        subprocess.run((*git, *command), cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def before(repository):
    return restamp.current_at("HEAD", [FILE, "benchmarks/results/none.json"], repository)


def test_records_current_at_a_commit_by_its_own_rule(repository, before):
    assert list(before) == [FILE] and list(before[FILE]) == ["kept", "anew", "other"]
    with pytest.raises(RuntimeError, match="nowhere"):
        restamp.current_at("nowhere", [FILE], repository)


def test_what_was_current_and_is_the_same_record_gets_the_present_hash(repository, before, monkeypatch):
    data = json.loads((repository / FILE).read_text())
    present = sources.kernel_hash
    changed = lambda case: "f" * 16 if case == OURS else present(case)
    for module in (sources, restamp):
        monkeypatch.setattr(module, "kernel_hash", changed)
    data["cases"]["anew"]["ms"] = 5
    assert restamp.restamp(data, before[FILE]) == ["kept"]
    assert {name: r["kernel"] for name, r in data["cases"].items()} == {
        "kept": "f" * 16, "old": "0" * 16, "anew": present(OURS), "other": present(OTHER)}
    assert restamp.restamp(data, before[FILE]) == []
