"""The commands of the documents, and a clean copy of the tree to run them in.

The block right after an `sh` block is what it prints, with `…` for what varies; a comment before one says why it is not
run."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```sh\n(?P<command>.+?)^```\n"
    r"(?:\n```(?P<language>json|text)\n(?P<output>.+?)^```\n)?",
    re.S | re.M,
)
SERVE = "make serve"  # the command that has been given, without arguments, when a document is followed
# Those of `make serve`, and those that documents give to a server beside it.
PORTS = ("8000", "8001", "8002", "9000", "9001", "9002")

Ports = dict[str, str]  # what a document says: what stands for it here


@dataclass(frozen=True)
class Block:
    """One command and, where the document says it, what it prints (else None) in which language."""

    command: str
    language: str | None
    output: str | None
    reason: str | None  # why it is not run

    @property
    def serves(self) -> bool:
        return self.command.partition("#")[0].strip() == SERVE

    @property
    def is_run(self) -> bool:
        return self.reason is None and not self.serves

    def is_what_it_prints(self, printed: str, ports: Ports) -> bool:
        """JSON is compared as values, all else by words; without an output, anything is right but nothing."""
        if self.output is None:
            return bool(printed.strip())
        if self.language == "json" and "…" not in self.output:
            with contextlib.suppress(json.JSONDecodeError):
                return bool(json.loads(printed) == json.loads(self.output))
            return False
        words = re.escape(" ".join(translated(self.output, ports).split()))
        return re.fullmatch(words.replace("…", ".*?"), " ".join(printed.split())) is not None


def blocks(document: Path) -> list[Block]:
    found = BLOCK.finditer(document.read_text())
    return [Block(each["command"], each["language"], each["output"], each["reason"]) for each in found]


def translated(text: str, ports: Ports) -> str:
    """`text` with this test's ports in the place of the document's; the client is given its own."""
    text = text.replace("tools/client.py", "tools/client.py --url localhost:8000")
    return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda port: ports[port[0]], text)


def copy_tree(copy: Path) -> None:
    """Writes what git would give somebody else of this tree."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, copy / name)
