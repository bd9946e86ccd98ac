"""The documents: links lead somewhere, files that are named exist, tables are current, lines have a width."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks import tables

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "benchmarks", "hope_kernels", "csrc", "examples", "tests", "tools")
DOCUMENTS = sorted({p.relative_to(ROOT).as_posix() for folder in FOLDERS
                    for p in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")})
RESULTS = ROOT / "benchmarks" / "results"
SUFFIXES = "py|md|cpp|cuh|cu|h|sh|svg|toml|yaml|cff"


@cache
def lines(document: str) -> list[tuple[int, str, bool]]:
    """(number, text, whether inside a fenced block), without the fences."""
    found, fenced = [], False
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        else:
            found.append((number, line, fenced))
    return found


def prose(document: str) -> str:
    return "\n".join(line for _, line, fenced in lines(document) if not fenced)


@cache
def file_names() -> set[str]:
    return {p.name for folder in FOLDERS[1:] for p in (ROOT / folder).rglob("*")} | {p.name for p in ROOT.iterdir()}


def headings(path: Path) -> set[str]:
    """As GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    at, missing = (ROOT / document).parent, []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, heading = target.partition("#")
        if not path.startswith(("http://", "https://")):
            there = (at / path).resolve() if path else ROOT / document
            if not there.exists() or heading and heading not in headings(there):
                missing.append(target)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    """In `code`: a path from the repository, the package or the document's own folder; or just a file's name."""
    at, missing = (ROOT / document).parent, []
    for name in re.findall(rf"`([\w./-]+\.(?:{SUFFIXES}))`", prose(document)):
        here = "/" in name and any((folder / name).exists() for folder in (ROOT, ROOT / "hope_kernels", at))
        if not (here or "/" not in name and name in file_names()):
            missing.append(name)
    assert not missing


def test_tables_and_plots_are_current_and_every_block_is_made():
    made = [d for d in DOCUMENTS if re.search(r"^<!-- \w+ -->$", prose(d), re.M)]
    assert sorted(made) == sorted(tables.DOCUMENTS)
    for document in made:
        blocks = set(re.findall(r"^<!-- (\w+) -->$", prose(document), re.M))
        assert blocks <= set(tables.blocks(RESULTS, document))
    assert tables.stale(RESULTS) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_have_a_width(document):
    """At most 120 characters, but in tables."""
    assert [number for number, line, _ in lines(document) if len(line) > 120 and not line.startswith("|")] == []


def test_the_index_names_every_document():
    index = set(re.findall(r"\]\(([^)#]+\.md)\)", prose("docs/README.md")))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"} <= index


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert f"## {project['version']} " in prose("CHANGELOG.md")


def test_hooks_need_no_network():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert all(hook["language"] == "system" for repo in config["repos"] for hook in repo["hooks"])
