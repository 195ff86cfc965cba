"""A user without a home or a name gets temporary ones; what is there is left as it is."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_triton.serving.home import missing_settings


def test_nothing_is_set_where_all_is_there(tmp_path: Path) -> None:
    assert missing_settings({"HOME": str(tmp_path), "LOGNAME": "anna"}, tmp_path / "spare") == {}


def test_a_home_that_is_not_there_is_replaced(tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    for home in ("/nowhere", "relative", os.devnull):
        assert missing_settings({"HOME": home, "LOGNAME": "anna"}, spare) == {"HOME": str(spare)}


def test_a_home_that_cannot_be_written_keeps_what_the_hub_left_in_it(tmp_path: Path) -> None:
    blocked = tmp_path / "home"
    blocked.mkdir()
    for name in (".cache", ".triton"):  # for root, who may write everywhere
        (blocked / name).touch()
    found = missing_settings({"HOME": str(blocked), "LOGNAME": "anna"}, tmp_path / "spare")
    assert found == {
        "XDG_CACHE_HOME": f"{tmp_path}/spare/cache",
        "HF_HOME": f"{blocked}/.cache/huggingface",
        "TRITON_CACHE_DIR": f"{tmp_path}/spare/triton",
    }
    chosen = {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": "/nowhere"}
    assert missing_settings({"HOME": str(blocked), "LOGNAME": "anna", **chosen}, tmp_path / "spare") == {}
