"""What the machine must have before anything is installed: its system, its disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from gptj_triton.install.programs import InstallError

GLIBC = (2, 35)  # the wheel nvidia-pytriton 0.7.0 is built for it
# With torch for CPUs: 1.5 GB installed and 0.4 GB of downloads; with CUDA: 5.2 GB and 2.9 GB.
LEAST_GIGABYTES = 2.0
CUDA_GIGABYTES = 8.2


def check_system(system: str, machine: str, libc: str) -> None:
    """Raises InstallError where tritonserver cannot run, for example `("Linux", "aarch64", "glibc 2.36")`."""
    if (system, machine) != ("Linux", "x86_64"):
        raise InstallError(f"this machine is {system} on {machine}; the tritonserver wheel is for Linux on x86_64")
    name, _, version = libc.partition(" ")
    least = ".".join(map(str, GLIBC))
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        raise InstallError(
            f"the C library is {libc or 'not glibc'}; tritonserver needs glibc {least} or newer, as in Debian 12 and "
            f"Ubuntu 22.04"
        )


def libc_version() -> str:
    """Such as "glibc 2.36"; empty where the C library is another."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


def check_folder(folder: Path, free_gigabytes: float) -> str | None:
    """Raises InstallError where nothing can be installed in `folder`, which exists; returns a warning, or None."""
    if os.pathsep in str(folder):
        raise InstallError(f"{folder}: a path with {os.pathsep!r} cannot stand in a search path; move the project")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InstallError(f"{folder} cannot be written by this user; use a copy of the project of your own")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise InstallError(f"{folder} is on a disk mounted noexec, from which no program runs; move the project")
    if free_gigabytes < LEAST_GIGABYTES:
        raise InstallError(f"{folder} has {free_gigabytes:.1f} GB free; {LEAST_GIGABYTES} GB are needed")
    if free_gigabytes < CUDA_GIGABYTES:
        return (
            f"{folder} has {free_gigabytes:.1f} GB free: enough for torch without CUDA (README.md says how to take "
            f"it); with CUDA, which PyPI has, {CUDA_GIGABYTES} GB are needed"
        )
    return None


def check_machine(folder: Path) -> str | None:
    """Raises InstallError where serving from `folder` cannot work; returns a warning, or None."""
    check_system(platform.system(), platform.machine(), libc_version())
    return check_folder(folder, shutil.disk_usage(folder).free / 1e9)
