"""The root of a small system, made by debootstrap, and an ordinary user in it. Needs root; nothing outside is changed.

What pip is told on this machine, pip is told there too: its settings, and the files and folders that they name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.shell import clean_environment

USER = "user"
HOME = Path("/home") / USER
SCRIPTS = Path("/usr/share/debootstrap/scripts")
KEYRINGS = Path("/usr/share/keyrings")
# The mount namespace is the command's own: what is mounted in the root is gone when the command ends.
ENTER = """
mount -t proc proc "$ROOT/proc"; mount --rbind /dev "$ROOT/dev"
for path in $LENT; do
    mount --bind "$path" "$ROOT$path"
    mount -o remount,bind,ro "$ROOT$path"
done
exec chroot --userspec="$AS" "$ROOT" /usr/bin/env -i $KEPT sh -c "$COMMAND"
"""


@dataclass(frozen=True)
class System:
    """A release, and the packages that it has besides the smallest set."""

    suite: str
    packages: tuple[str, ...]
    components: str = "main"
    mirror: str = ""  # debootstrap's own choice
    script: str = ""  # for a suite that debootstrap does not know
    keyring: str = "debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Root:
    """A system in a folder."""

    folder: Path

    def command(self, command: str, user: str = USER, **variables: str) -> list[str]:
        """The command line that runs `command` in the root, in a home, with the environment of a login. Only the
        ordinary user has pip's settings."""
        lent = [path for path in pip_paths() if path.exists() and user == USER]
        for path in lent:
            place = Path(f"{self.folder}{path}")
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
        home = HOME if user == USER else Path("/root")
        kept = {
            **(pip_settings() if user == USER else {}),
            **variables,
            "HOME": str(home),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        values = {
            "ROOT": str(self.folder),
            "AS": f"{user}:{user}",
            "LENT": " ".join(map(str, lent)),
            "COMMAND": f"cd {home}; {command}",
        }
        exports = "; ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
        environment = " ".join(shlex.quote(f"{name}={value}") for name, value in kept.items())
        script = exports + ENTER.replace("$KEPT", environment)
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]

    def run(self, command: str, user: str = USER, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs `command` to its end, stdout and stderr together."""
        words = self.command(command, user, **variables)
        return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def make_root(system: System) -> Root:
    """Makes the system in a new folder of the temporary directory."""
    assert os.getuid() == 0, "debootstrap and chroot need root"
    assert shutil.which("debootstrap"), "apt-get install debootstrap"
    root = Root(Path(tempfile.mkdtemp(prefix=f"bare-{system.suite}-")) / "root")
    options = [
        f"--keyring={KEYRINGS / system.keyring}",
        "--variant=minbase",
        *([f"--include={','.join(system.packages)}"] if system.packages else []),
        f"--components={system.components}",
    ]
    script = [] if (SCRIPTS / system.suite).exists() else [str(SCRIPTS / system.script)]
    words = ["debootstrap", *options, system.suite, str(root.folder), system.mirror, *script]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, root.folder / "etc" / name)
    assert root.run(f"useradd --create-home {USER}", user="root").returncode == 0
    return root


def delete_root(root: Root) -> None:
    shutil.rmtree(root.folder.parent)


def pip_settings() -> dict[str, str]:
    """pip's settings of this machine as variables: `global.index-url='…'` is PIP_INDEX_URL."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, env=clean_environment()).stdout
    settings = re.findall(r"^(?:global|:env:)\.([\w.-]+)='(.*)'$", listed, re.M)
    return {f"PIP_{name.strip('.').replace('-', '_').upper()}": value for name, value in settings}


def pip_paths() -> list[Path]:
    """The files and folders of this machine that pip's settings name; of an index of files the folder around it."""
    words = [word for value in pip_settings().values() for word in value.split()]
    files = [Path(word) for word in words if word.startswith("/")]
    return [*files, *(Path(word.removeprefix("file://")).parent for word in words if word.startswith("file://"))]
