"""A user without a home or a name gets temporary ones; what is there is left as it is."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_triton.serving.home import missing_settings

NAMED = {"LOGNAME": "anna", "TORCHINDUCTOR_CACHE_DIR": "/its/own"}


def test_nothing_is_set_where_all_is_there(tmp_path: Path) -> None:
    environment = NAMED | {"HOME": str(tmp_path)}
    assert missing_settings(environment, tmp_path / "spare") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_not_there_is_replaced(tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    closed = f"/tmp/{'x' * 256}"  # like the home of somebody else, nobody can tell whether it is there
    for home in ("/nowhere", "relative", os.devnull, closed):
        assert missing_settings(NAMED | {"HOME": home}, spare) == {"HOME": str(spare)}


def test_a_home_that_cannot_be_written_keeps_what_the_hub_left_in_it(tmp_path: Path) -> None:
    blocked = tmp_path / "home"
    blocked.mkdir()
    for name in (".cache", ".triton"):  # for root, who may write everywhere
        (blocked / name).touch()
    found = missing_settings(NAMED | {"HOME": str(blocked)}, tmp_path / "spare")
    assert found == {
        "XDG_CACHE_HOME": f"{tmp_path}/spare/cache",
        "HF_HOME": f"{blocked}/.cache/huggingface",
        "TRITON_CACHE_DIR": f"{tmp_path}/spare/triton",
    }
    chosen = {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": "/nowhere"}
    assert missing_settings(NAMED | chosen | {"HOME": str(blocked)}, tmp_path / "spare") == {}


def test_a_home_is_tried_because_root_has_all_rights_in_proc(tmp_path: Path) -> None:
    assert {"XDG_CACHE_HOME", "TRITON_CACHE_DIR"} <= missing_settings(NAMED | {"HOME": "/proc"}, tmp_path).keys()


def test_what_torch_would_leave_among_temporary_files_is_kept_with_the_run(tmp_path: Path) -> None:
    found = missing_settings({"HOME": str(tmp_path), "LOGNAME": "anna"}, tmp_path / "spare")
    assert found == {"TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/spare/torchinductor"}
