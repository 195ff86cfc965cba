"""How often and how soon a server that died is started again."""

from __future__ import annotations

from gptj_triton.serving.restarts import Restarts


def test_the_first_restart_is_at_once_and_the_pauses_between_the_next_double() -> None:
    restarts = Restarts(limit=20, window=1000.0)
    pauses = [restarts.pause_before_next(float(second), ready_for=0.0) for second in range(9)]
    assert pauses == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert restarts.count == 9


def test_a_server_that_was_ready_does_not_wait_long() -> None:
    restarts = Restarts(limit=20, window=1000.0)
    pauses = [restarts.pause_before_next(float(second), ready_for=1.0) for second in range(7)]
    assert pauses == [0.0, 0.25, 0.5, 1.0, 2.0, 2.0, 2.0]


def test_a_server_that_was_ready_for_a_while_is_started_again_at_once() -> None:
    restarts = Restarts(limit=20, window=1000.0)
    for second in range(3):
        restarts.pause_before_next(float(second), ready_for=0.0)
    assert restarts.pause_before_next(100.0, ready_for=60.0) == 0.0
    assert restarts.pause_before_next(101.0, ready_for=0.0) == 0.0
    assert restarts.pause_before_next(102.0, ready_for=0.0) == 0.25


def test_only_so_many_restarts_are_allowed_within_the_window() -> None:
    restarts = Restarts(limit=2, window=10.0)
    assert restarts.pause_before_next(0.0, ready_for=60.0) == 0.0
    assert restarts.pause_before_next(9.0, ready_for=60.0) == 0.0
    assert restarts.pause_before_next(9.5, ready_for=60.0) is None
    assert restarts.pause_before_next(10.5, ready_for=60.0) == 0.0  # the first was longer ago
    assert restarts.count == 3


def test_none_may_be_allowed_at_all() -> None:
    assert Restarts(limit=0, window=10.0).pause_before_next(0.0, ready_for=60.0) is None
