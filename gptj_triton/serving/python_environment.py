"""The Python environment that Triton's stubs find, by the `python3` on PATH: this one, or one of links to it.

A stub reads `.pth` files as ASCII, whatever the locale, and does not start when one of them, as `pip install -e` writes
it, names a directory with other letters.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from gptj_triton.process.directory import PACKAGE
from gptj_triton.process.temporary import is_plain


def find_programs(folder: Path) -> Path:
    """The `bin` of this environment, or where its path or the project's is not plain, of one made in `folder`."""
    own = Path(sys.prefix)
    if is_plain(own) and is_plain(PACKAGE):
        return own / "bin"
    # The same version's directory below another prefix.
    packages = folder / Path(sysconfig.get_path("purelib")).relative_to(own)
    packages.mkdir(parents=True)
    (folder / "bin").symlink_to(own / "bin")
    settings = f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n"
    (folder / "pyvenv.cfg").write_text(settings, encoding="utf-8", errors="surrogateescape")
    (packages / PACKAGE.name).symlink_to(PACKAGE)
    for path in map(Path, {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for entry in path.iterdir():
            link = packages / entry.name
            if not link.is_symlink() and (entry.suffix != ".pth" or entry.read_bytes().isascii()):
                link.symlink_to(entry)
    return folder / "bin"
