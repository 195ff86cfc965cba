"""Files of packages are fetched by the real apt, from an archive of local files."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_triton.install import debian
from gptj_triton.install.interpreter import describe
from gptj_triton.install.programs import InstallError

pytestmark = pytest.mark.skipif(not shutil.which("apt-get"), reason="there is no apt here")
PYTHON = describe()._replace(version="3.12", prefix="/usr")
AddPackage = Callable[..., None]


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddPackage:
    """An archive that is the only source of apt; the function adds the package NAME of VERSION with one small file."""
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "Packages").touch()
    (tmp_path / "sources").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::SourceList "{tmp_path}/sources"; Dir::Etc::SourceParts "/dev/null";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))

    def add(name: str, version: str, file: str, depends: str = "dpkg") -> None:
        tree = tmp_path / f"{name}_{version}"
        (tree / file).parent.mkdir(parents=True)
        (tree / file).write_text(version)
        (tree / "DEBIAN").mkdir()
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@b.c>\n"
        control += f"Depends: {depends}\nDescription: a\n"
        (tree / "DEBIAN" / "control").write_text(control)
        package = folder / f"{name}_{version}_all.deb"
        subprocess.run(["dpkg-deb", "--build", tree, package], check=True, stdout=subprocess.DEVNULL)
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        with (folder / "Packages").open("a") as packages:
            size = package.stat().st_size
            packages.write(f"{control}Filename: ./{package.name}\nSize: {size}\nSHA256: {digest}\n\n")

    return add


def library(package: str) -> str:
    return f"usr/lib/x86_64-linux-gnu/{package}.so.1.0"


def test_the_installed_version_is_taken_before_a_newer_one(
    archive: AddPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "installed_version", lambda package: "3.12.3-1")
    for version in ("3.12.3-1", "3.12.3-2"):
        archive("libpython3.12", version, library("libpython3.12"))
    assert debian.unpack_library(PYTHON, tmp_path).read_text() == "3.12.3-1"


def test_a_newer_version_is_taken_where_the_installed_one_is_gone(
    archive: AddPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "installed_version", lambda package: "3.12.3-1")
    archive("libpython3.12", "3.12.3-2", library("libpython3.12"))
    assert debian.unpack_library(PYTHON, tmp_path).read_text() == "3.12.3-2"


def test_ubuntus_name_of_the_package_is_known(archive: AddPackage, tmp_path: Path) -> None:
    archive("libpython3.12t64", "3.12.3-1ubuntu0.5", library("libpython3.12"))
    assert debian.unpack_library(PYTHON, tmp_path).name == "libpython3.12.so.1.0"


def test_pip_is_fetched_as_a_wheel(archive: AddPackage, tmp_path: Path) -> None:
    archive("python3-pip-whl", "23.0", "usr/share/python-wheels/pip-23.0-py3-none-any.whl")
    assert debian.unpack_pip(tmp_path).name == "pip-23.0-py3-none-any.whl"


def test_a_package_that_cannot_be_fetched_is_named(archive: AddPackage, tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"apt fetches no python3-pip-whl: .*python3-pip-whl"):
        debian.unpack_pip(tmp_path)


def test_packages_come_with_what_they_need_and_the_machine_lacks(archive: AddPackage, tmp_path: Path) -> None:
    archive("a-proxy", "1.0", "usr/sbin/a-proxy", depends="a-library, dpkg")
    archive("a-library", "2.0", "usr/lib/a-library.so")
    archive("a-module", "3.0", "usr/lib/a-module.so")
    archive("of-no-use", "4.0", "usr/lib/of-no-use.so")
    files = debian.unpack_all(["a-proxy", "a-module"], tmp_path)
    found = {path.name: path.read_text() for path in files.rglob("*") if path.is_file()}
    assert found == {"a-proxy": "1.0", "a-library.so": "2.0", "a-module.so": "3.0"}
    with pytest.raises(InstallError, match="no-such-package"):
        debian.unpack_all(["no-such-package"], tmp_path)


def test_versions_are_dpkgs() -> None:
    assert debian.installed_version("dpkg")
    assert debian.installed_version("no-such-package") == ""
    assert not debian.is_packaged(describe()._replace(prefix="/opt/python"))
