"""English prose to train on, from packages of Debian's section main: their HTML and plain text as one file.

    apt-get install debian-handbook debian-policy developers-reference debian-reference-en debian-faq dict-foldoc
    python examples/debian_text.py prose.txt

Tags, scripts and tables of contents are left out, runs of blank lines become one. The licences, all of them free by
Debian's guidelines, stand in /usr/share/doc/PACKAGE/copyright.
"""

import argparse
import glob
import gzip
import hashlib
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

DOC = "/usr/share/doc"
FILES = (  # what holds a package's English text once
    f"{DOC}/debian-handbook/html/en-US/*.html",
    f"{DOC}/debian-policy/policy.txt.gz",
    "/usr/share/developers-reference/developers-reference.txt.gz",
    "/usr/share/debian-reference/debian-reference.en.txt.gz",
    f"{DOC}/debian/FAQ/debian-faq.en.txt.gz",
    "/usr/share/dictd/foldoc.dict.dz",
)
SILENT = {"script", "style", "head", "nav", "dl"}
PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\xa0", "''\"\"-- ")
BREAKS = {"p", "div", "h1", "h2", "h3", "h4", "li", "pre", "br", "tr", "table"}


class Prose(HTMLParser):
    """What a reader sees; ``text`` holds it in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in SILENT
        if tag in BREAKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in SILENT and self.silent > 0
        if tag in BREAKS:
            self.text.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.text.append(data)


def plain(text: str) -> str:
    """Quotes, dashes and accents as ASCII has them."""
    return unicodedata.normalize("NFKD", text.translate(PLAIN).expandtabs())


def prose(path: str) -> str:
    with gzip.open(path) if path.endswith((".gz", ".dz")) else open(path, "rb") as f:
        text = f.read().decode(errors="ignore")
    if path.endswith(".html"):
        parser = Prose()
        parser.feed(text)
        text = "".join(parser.text)
    lines = (re.sub(r"[^\n\x20-\x7e]", "", line).rstrip() for line in plain(text).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("out", type=Path)
    args = p.parse_args()
    pieces = []
    for pattern in FILES:
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise SystemExit(f"{pattern}: no such file; install the packages that the head of this program names")
        text = "".join(map(prose, paths))
        print(f"{len(text):9} bytes  {pattern}")
        pieces.append(text)
    data = "".join(pieces).encode()
    args.out.write_bytes(data)
    print(f"{len(data):9} bytes  {args.out}  sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
