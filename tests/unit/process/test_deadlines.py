"""When a request is to be ended, and when its last seconds begin."""

from __future__ import annotations

from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.engine.sequence import Sequence
from gptj_triton.process.deadlines import LAST_SECONDS, Deadlines


def test_each_request_is_due_once_and_told_of_in_its_last_seconds() -> None:
    early, late, gone = (Sequence(key, [1], SamplingParams(request_output_len=1, end_ids=())) for key in range(3))
    deadlines = Deadlines()
    for sequence, moment in ((early, 100.0), (late, 200.0), (gone, 100.0)):
        deadlines.add(sequence, moment)
    deadlines.forget(gone.key)
    assert deadlines.take_due(99.9 - LAST_SECONDS) == ([], [])
    assert deadlines.take_due(100.0 - LAST_SECONDS) == ([], [early])
    assert deadlines.take_due(99.9) == ([], [])
    assert deadlines.take_due(100.0) == ([early], [])
    assert deadlines.take_due(200.0) == ([late], [])
    assert deadlines.take_due(1000.0) == ([], [])
