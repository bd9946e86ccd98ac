"""Turn Debian's King James Bible into plain text files to train on and to read.

    apt-get install bible-kjv                      # brings bible-kjv-text, the text itself
    bible -f Gen1:1-Rev22:21 | python examples/kjv_text.py data/

writes three files into data/:

    kjv.txt           the whole text
    kjv-heldout.txt   the held-out books (default: John and Acts)
    kjv-train.txt     all the other books

A book is its name, a blank line, then one verse per line without its number, a blank line between chapters.
Two blank lines separate books.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

# The program's abbreviations in the order of the text, and the name each book gets.
BOOKS = dict(
    pair.split("=")
    for pair in (
        "Ge=Genesis,Exo=Exodus,Lev=Leviticus,Num=Numbers,Deu=Deuteronomy,Josh=Joshua,Jdgs=Judges,Ruth=Ruth,"
        "1Sm=1 Samuel,2Sm=2 Samuel,1Ki=1 Kings,2Ki=2 Kings,1Chr=1 Chronicles,2Chr=2 Chronicles,Ezra=Ezra,"
        "Neh=Nehemiah,Est=Esther,Job=Job,Psa=Psalms,Prv=Proverbs,Eccl=Ecclesiastes,SSol=Song of Solomon,"
        "Isa=Isaiah,Jer=Jeremiah,Lam=Lamentations,Eze=Ezekiel,Dan=Daniel,Hos=Hosea,Joel=Joel,Amos=Amos,"
        "Obad=Obadiah,Jonah=Jonah,Mic=Micah,Nahum=Nahum,Hab=Habakkuk,Zep=Zephaniah,Hag=Haggai,"
        "Zec=Zechariah,Mal=Malachi,Mat=Matthew,Mark=Mark,Luke=Luke,John=John,Acts=Acts,Rom=Romans,"
        "1Cor=1 Corinthians,2Cor=2 Corinthians,Gal=Galatians,Eph=Ephesians,Phi=Philippians,Col=Colossians,"
        "1Th=1 Thessalonians,2Th=2 Thessalonians,1Tim=1 Timothy,2Tim=2 Timothy,Titus=Titus,Phmn=Philemon,"
        "Heb=Hebrews,Jas=James,1Pet=1 Peter,2Pet=2 Peter,1Jn=1 John,2Jn=2 John,3Jn=3 John,Jude=Jude,"
        "Rev=Revelation"
    ).split(",")
)
VERSE = re.compile(r"([1-3]?[A-Z][A-Za-z]*)(\d+):(\d+) (.+)")


def read_books(lines: Iterable[str]) -> dict[str, str]:
    """Book name -> its text, from the lines of `bible -f` ("Ge1:1 In the beginning ...").

    >>> print(read_books(["Jude1:1 Jude, the servant", "Rev1:20 The mystery", "Rev2:1 Unto the angel"])["Revelation"])
    Revelation
    <BLANKLINE>
    The mystery
    <BLANKLINE>
    Unto the angel
    <BLANKLINE>
    """
    chapters: dict[str, dict[int, list[str]]] = {}
    for number, line in enumerate(lines, 1):
        match = VERSE.fullmatch(line.strip())
        if match is None or match[1] not in BOOKS:
            raise ValueError(f"line {number}: expected a verse such as 'Ge1:1 In the beginning', got {line[:60]!r}")
        chapters.setdefault(BOOKS[match[1]], {}).setdefault(int(match[2]), []).append(" ".join(match[4].split()))
    return {
        book: f"{book}\n\n" + "\n\n".join("\n".join(verses) for verses in by_chapter.values()) + "\n"
        for book, by_chapter in chapters.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument(
        "--heldout", nargs="+", default=["John", "Acts"], metavar="BOOK", help="books kept out of the training text"
    )
    args = parser.parse_args()
    books = read_books(sys.stdin)
    if len(books) != len(BOOKS):
        parser.error(
            f"expected {len(BOOKS)} books on standard input, got {len(books)}; run: bible -f Gen1:1-Rev22:21"
        )
    if unknown := set(args.heldout) - set(books):
        parser.error(f"--heldout: no such book: {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {
        "kjv.txt": list(books),
        "kjv-heldout.txt": [book for book in books if book in args.heldout],
        "kjv-train.txt": [book for book in books if book not in args.heldout],
    }
    for name, chosen in parts.items():
        data = "\n\n".join(books[book] for book in chosen).encode("ascii")
        (args.out / name).write_bytes(data)
        print(f"{name:16} {len(chosen):3} books {len(data):8} bytes  sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
