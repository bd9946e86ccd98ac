"""Says of results that a change of code left them as they were: writes the present hash into them.

    python -m benchmarks.restamp FILE ... --since COMMIT

A record gets the present hash where, at COMMIT, the same record was in the same file and COMMIT's own rule
called it current; a record that was older there, or has been measured since, stays as it is.

This is honest after a change that provably left alone every bit of the results and the time they took: a
rearrangement whose tests hold bits to what they were and whose kernels compile to the same instructions, the
text of a message, a new check on a path that is not timed. After anything else, measure again.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.machine import write_json
from benchmarks.records import measured
from benchmarks.sources import ROOT, age, kernel_hash

JUDGE = """
import json, sys
try:
    from benchmarks.records import measured
except ImportError:
    from benchmarks.report import measured
from benchmarks.sources import age
found = {}
for file in sys.argv[1:]:
    try:
        with open(file) as f:
            data = json.load(f)
    except OSError:
        continue
    found[file] = {name: record for name, record in measured(data) if age(record) == "current"}
print(json.dumps(found))
"""


def current_at(commit: str, files: list[str], root: Path = ROOT) -> dict[str, dict[str, dict]]:
    """{file: {name: record}} of the records that were current at a commit, by its own code and rule. files:
    relative to ``root``. Raises RuntimeError, with what git or the judge said."""
    packed = subprocess.run(("git", "archive", commit), cwd=root, capture_output=True)
    if packed.returncode:
        raise RuntimeError(packed.stderr.decode().strip())
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tree:
            tree.extractall(folder, filter="data")
        judge = (sys.executable, "-c", JUDGE, *files)
        done = subprocess.run(judge, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


def restamp(data: dict, before: dict[str, dict]) -> list[str]:
    """Writes the present hash into the records of a result file that are those of ``before``, hashes aside,
    and returns their names."""
    bare = lambda record: {k: v for k, v in record.items() if k != "kernel"}
    found = []
    for name, record in measured(data):
        if name in before and bare(record) == bare(before[name]) and age(record) == "older":
            record["kernel"] = kernel_hash(record.get("kernel_of") or record["case"])
            found.append(name)
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("files", nargs="+", type=Path, metavar="FILE")
    p.add_argument("--since", required=True, metavar="COMMIT", help="where the records were current")
    args = p.parse_args(argv)
    names = {path: path.resolve().relative_to(ROOT).as_posix() for path in args.files}
    before = current_at(args.since, list(names.values()))
    for path, name in names.items():
        data = json.loads(path.read_text(encoding="utf-8"))
        if found := restamp(data, before.get(name, {})):
            write_json(str(path), data)
        print(f"{path}: {', '.join(n or 'the file' for n in found) or 'nothing'} restamped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
