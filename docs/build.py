"""Build the site: `make docs`.

Pages are copied to build/docs-source with their placeholders filled (tables.py), the pictures of benchmarks beside
them; Zensical makes the site of that, in build/docs. A warning, as of a link that leads nowhere, is an error.

Zensical is the successor of Material for MkDocs, which ends in 2027; it reads the same mkdocs.yml, and runs no hooks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
SOURCE = BUILD / "docs-source"
sys.path[:0] = [str(ROOT), str(HERE)]

import tables  # noqa: E402


def main() -> int:
    shutil.rmtree(SOURCE, ignore_errors=True)
    for page in (HERE / "pages").rglob("*.md"):
        name = page.relative_to(HERE / "pages")
        target = SOURCE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(tables.expand(page.read_text(), len(name.parts) - 1))
    (SOURCE / "results").mkdir()
    for picture in tables.RESULTS.glob("*.png"):
        shutil.copy(picture, SOURCE / "results")
    shutil.copy(HERE / "mkdocs.yml", BUILD)
    return subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=BUILD).returncode


if __name__ == "__main__":
    sys.exit(main())
