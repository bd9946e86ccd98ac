"""Packages that a machine without network is given as a folder of wheels: each is a zip, and is unpacked to
where this process and its children look for modules last of all."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path


def use(folder: Path, into: Path) -> list[str]:
    """Unpacks the wheels of ``folder`` and returns their names; what is installed already goes before
    them."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(into)
    if wheels and str(into) not in sys.path:
        sys.path.append(str(into))
    return [wheel.name for wheel in wheels]


def variables(into: Path) -> dict[str, str]:
    """The environment in which a child finds them: as they come on PYTHONPATH before what is installed, a
    folder must not hold another version of what is there."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(into))))}
