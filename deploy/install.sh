#!/bin/sh
# Installs what an image holds, as root, on Debian 12 or on NVIDIA's Triton image (Ubuntu 24.04). deploy/Containerfile runs it.
#   install.sh system     the packages that serving needs besides the base image
#   install.sh project    this checkout and its Python packages, in /opt/gptj-triton
set -eu
umask 022
export DEBIAN_FRONTEND=noninteractive
source=$(cd "$(dirname "$0")/.." && pwd)
target=/opt/gptj-triton

install_packages() {
    apt-get -qq update
    apt-get -qq install --no-install-recommends "$@" >/dev/null
    apt-get clean
    rm -rf /var/lib/apt/lists/*
}

install_system() {
    # NVIDIA's image has it, with the shared library that its stub loads. Debian's library goes into the environment below.
    command -v python3 >/dev/null || install_packages python3
}

install_project() {
    # geventhttpclient has no wheel for Python 3.12, NVIDIA's. Nothing of this is in the image's last stage.
    python3 -c 'import sys; sys.exit(sys.version_info[:2] == (3, 12))' || install_packages gcc libc6-dev libpython3-dev
    # NVIDIA's image has a tritonserver. The one for Debian is a wheel.
    extra='[tritonserver]'
    if [ -x /opt/tritonserver/bin/tritonserver ]; then extra=; fi

    mkdir -p "$target/deploy"
    cd "$source"
    cp -R LICENSE README.md pyproject.toml constraints.txt backends gptj_triton model_repository tools "$target"
    cp deploy/healthcheck "$target/deploy"
    cd "$target"
    python3 -m gptj_triton.install .venv
    TMPDIR="$target/.venv" .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
    # The root is read-only when it serves, so what Python compiles is compiled now.
    .venv/bin/python -m compileall -q backends gptj_triton model_repository
    # Ends with an error, which says why, where the tritonserver and the Python do not fit each other.
    .venv/bin/python -c 'from gptj_triton.serving import installation as i; print(i.find_triton().stub, i.find_python_library())'
    .venv/bin/python -m pip uninstall --quiet --yes --root-user-action ignore pip
    # Any user may run it, whatever the modes in the checkout.
    chmod -R a+rX "$target"
}

case "${1-}" in
    system) install_system ;;
    project) install_project ;;
    *) echo "usage: install.sh system | project" >&2; exit 2 ;;
esac
