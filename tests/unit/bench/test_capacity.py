"""The simulation of capacity: the real scheduler, every request ends, the same seed gives the same, and figures that
can be computed by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gptj_triton.bench.capacity import command, replica_files
from gptj_triton.bench.capacity.calibration import durations
from gptj_triton.bench.capacity.mix import Lengths, of_lengths, read_log
from gptj_triton.bench.capacity.recording_engine import work
from gptj_triton.bench.capacity.replica import Arrival, Replica, Settings
from gptj_triton.bench.capacity.simulation import Seen, simulate
from gptj_triton.bench.capacity.sizing import Sizing, Wanted
from gptj_triton.bench.capacity.step_times import FittedTimes, Step
from gptj_triton.bench.capacity.whole_runs import whole_runs
from gptj_triton.engine.scheduler import Scheduler
from gptj_triton.engine.step_plan import GroupPlan, StepPlan

SETTINGS = Settings(
    num_pages=64,
    page_size=16,
    context_length=512,
    step_tokens=64,
    max_sequences=8,
    max_waiting_requests=1000,
    max_waiting_tokens=1 << 20,
    steps_ahead=0,
    own_seconds=0.0,
)
MIX = of_lengths(Lengths.parse("uniform:2,100"), Lengths.parse("lognormal:10,1,50"))


class Linear:
    """10 ms a step, 1 ms a sequence that decodes, 0.1 ms a prompt's token."""

    error, points = 0.0, 0

    def seconds(self, step: Step, chance: random.Random) -> float:
        return 0.01 + 0.001 * step.decoding + 0.0001 * step.prompt_tokens


def tokens(arrivals: Sequence[Arrival], settings: Settings = SETTINGS, replicas: int = 1) -> list[list[float]]:
    served, _ = simulate(Linear(), settings, arrivals, [0.0] * replicas)
    return [each.tokens for each in served]


def test_a_replica_runs_the_real_scheduler() -> None:
    assert type(Replica(Linear(), SETTINGS).engine.scheduler) is Scheduler


def test_a_request_alone_takes_what_one_computes_by_hand() -> None:
    [found] = tokens([Arrival(1.0, prompt=20, output=3)], replace(SETTINGS, own_seconds=0.005))
    assert found == pytest.approx([1.0 + 0.005 + 0.012, 1.028, 1.039])


def test_a_request_waits_for_the_step_under_way_and_shares_the_next() -> None:
    first, second = tokens([Arrival(0.0, 20, 3), Arrival(0.001, 30, 1)])
    assert first == pytest.approx([0.012, 0.012 + 0.014, 0.037])
    assert second == pytest.approx([0.026])


def test_a_long_prompt_is_computed_in_steps_of_step_tokens() -> None:
    [found] = tokens([Arrival(0.0, prompt=100, output=1)])
    assert found == pytest.approx([2 * 0.01 + 0.01])


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("pages", [16, 64])
def test_every_request_gets_all_its_tokens_in_order(steps_ahead: int, pages: int) -> None:
    settings = replace(SETTINGS, steps_ahead=steps_ahead, num_pages=pages)
    arrivals = MIX.poisson(rate=200, count=300, seed=1)
    served, [replica] = simulate(Linear(), settings, arrivals)
    assert [len(each.tokens) for each in served] == [arrival.output for arrival in arrivals]
    assert all(each.tokens == sorted(each.tokens) and each.tokens[0] > each.arrival.at for each in served)
    assert (len(replica.engine.scheduler), replica.connections(math.inf)) == (0, 0)
    replica.engine.check_integrity()
    assert (replica.usage.preemptions > 0) is (pages == 16)


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    assert tokens(MIX.poisson(50, 100, seed=3)) == tokens(MIX.poisson(50, 100, seed=3))
    assert tokens(MIX.poisson(50, 100, seed=3)) != tokens(MIX.poisson(50, 100, seed=4))


def test_more_load_takes_longer_and_more_replicas_less() -> None:
    sizing = Sizing(Linear(), SETTINGS, MIX, seconds=1.0, seed=0)
    light, heavy, shared = (sizing.at(*at) for at in ((2.0,), (30.0,), (30.0, 3)))
    assert light.first_token.p99 < heavy.first_token.p99
    assert light.between_tokens.p50 < heavy.between_tokens.p50
    assert shared.first_token.p99 < heavy.first_token.p99


def test_what_waits_beyond_the_limit_is_refused() -> None:
    settings = replace(SETTINGS, max_sequences=1, max_waiting_requests=2)
    seen = Seen.of(simulate(Linear(), settings, [Arrival(0.0, 10, 5)] * 10)[0])
    assert (seen.requests, seen.refused) == (10, 7)


def test_a_shared_beginning_of_prompts_is_computed_once() -> None:
    arrivals = [Arrival(float(at), prompt=64, output=1, shared=48) for at in range(2)]
    first, second = tokens(arrivals)
    assert first == pytest.approx([0.0164])
    assert second == pytest.approx([1.0116])


def test_least_connections_sends_a_request_to_the_idle_replica() -> None:
    arrivals = [Arrival(0.0, 2, 50), Arrival(0.001, 2, 1), Arrival(0.1, 2, 1)]
    _, second, third = tokens(arrivals, replicas=2)
    assert second + third == pytest.approx([0.0112, 0.1102])


def test_a_replica_that_has_not_started_gets_nothing() -> None:
    served, [_, late] = simulate(Linear(), SETTINGS, [Arrival(0.0, 2, 1), Arrival(0.0, 2, 1)], [0.0, 5.0])
    assert all(each.tokens for each in served)
    assert late.usage.steps == 0


def test_a_plan_meets_what_is_wanted_and_one_replica_fewer_does_not() -> None:
    sizing, wanted = Sizing(Linear(), SETTINGS, MIX, seconds=1.0, seed=0), Wanted(first_token=100, between_tokens=40)
    plan = sizing.plan(60.0, wanted)
    assert plan is not None
    assert plan.replicas > 1
    assert plan.share <= plan.saturation.requests
    assert wanted.met_by(plan.seen)
    assert not wanted.met_by(sizing.at(60.0, plan.replicas - 1))
    assert sizing.plan(100.0, Wanted(first_token=1)) is None


def test_saturation_names_what_is_lacking() -> None:
    def limit(**settings: int) -> str:
        return Sizing(Linear(), replace(SETTINGS, **settings), MIX, 1.0, 0).saturation().limit

    assert "max_sequences" in limit(max_sequences=2)
    assert "kv_cache_gib" in limit(num_pages=16, max_sequences=64)
    assert "steps" in limit(step_tokens=8, num_pages=1024, max_sequences=256)


def test_steps_that_were_recorded_give_their_formula_back() -> None:
    chance = random.Random(0)
    steps = [Step(chance.randrange(64), chance.randrange(5000), 20 * (i % 2), i % 2) for i in range(300)]
    fitted = FittedTimes.fit(
        [(step, Linear().seconds(step, chance) * (9 if i < 5 else 1)) for i, step in enumerate(steps)]
    )
    assert fitted.formula(Step(10, 1000, 20, 1)) == pytest.approx(0.022, rel=0.01)
    assert max(fitted.ratios) == pytest.approx(9, rel=0.1)
    with pytest.raises(ValueError, match="3 steps were recorded"):
        FittedTimes.fit([(Step(1, 1, 0, 0), 0.1)] * 3)


def test_a_step_before_a_pause_has_no_duration() -> None:
    decoding, prompt = Step(1, 5, 0, 0), Step(0, 0, 9, 1)
    assert durations([(0.0, prompt), (0.1, decoding), (9.0, prompt), (9.5, decoding)]) == [(prompt, 0.1), (prompt, 0.5)]


def test_the_work_of_a_plan_is_told_in_numbers() -> None:
    groups = [GroupPlan(0, 1, [5, 7], [[], []]), GroupPlan(2, 9, [16], [[]])]
    assert work(StepPlan([], [], [], [], groups, [], [])) == (2, 14, 9, 1, 144)


def test_whole_runs_of_a_gpu_are_predicted() -> None:
    kind = replica_files.read(command.H100, {}, None)
    [run] = whole_runs(kind, most_tokens=10_000)
    assert run.what == "whole run 128/128, 64 requests"
    assert run.predicted == pytest.approx(run.measured, rel=0.1)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    times = FittedTimes([0.01, 0.001, 0, 0, 0, 0.0001, 0], [1.0], 0.02, 100)
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"benchmark": "steps", "machine": "m"} | replica_files.written(times, SETTINGS)))
    kind = replica_files.read(path, {"max_sequences": 3}, 0.5)
    assert kind.settings == replace(SETTINGS, max_sequences=3, own_seconds=0.5)
    assert kind.times.seconds(Step(2, 0, 30, 1), random.Random()) == pytest.approx(0.015)


def test_lengths_have_their_mean_and_their_limit() -> None:
    chance = random.Random(0)
    drawn = [Lengths.parse("lognormal:100,0.5,300").draw(chance) for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(100, rel=0.05)
    assert max(drawn) == 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=fixed:0", "--output=fixed:1", "--rate=1"], "allowed: 1 to 1,048,576 for 0"),
        (["--prompt=gauss:3", "--output=fixed:1", "--rate=1"], "'gauss:3', expected fixed:N"),
        (["--prompt=uniform:9,3", "--output=fixed:1", "--rate=1"], "allowed: LEAST up to MOST"),
        (["--prompt=fixed:nan", "--output=fixed:1", "--rate=1"], "allowed: 1 to"),
        (["--prompt=fixed:5", "--output=fixed:1", "--rate=0"], "argument --rate: '0', allowed: numbers from"),
        (["--prompt=fixed:5", "--output=fixed:1"], "--rate is missing"),
        (["--prompt=fixed:5", "--rate=1"], "--prompt and --output go together"),
        (["--rate=1"], "lengths are missing"),
        (["--prompt=fixed:5", "--output=fixed:1", "--log=x"], "--log stands in the place"),
        (["--max-sequences=1.5"], "argument --max-sequences: '1.5', allowed: whole numbers from 1"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2: not a JSON object"),
        ('{"prompt_tokens": 0, "output_tokens": 1}', "line 2: prompt_tokens is 0, allowed: whole numbers from 1"),
        ('{"prompt_tokens": 1}', "line 2: output_tokens is None"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "at": "noon"}', "line 2: at is 'noon', allowed: seconds"),
    ],
)
def test_a_bad_line_of_a_log_is_named(line: str, words: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f'{{"prompt_tokens": 5, "output_tokens": 6, "at": 2}}\n{line}\n')
    with pytest.raises(ValueError, match="log, ") as raised:
        read_log(log)
    assert words in str(raised.value)


def test_a_log_gives_lengths_and_a_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f'{{"prompt_tokens": 20, "output_tokens": 4, "at": {50 + i / 4}}}\n' for i in range(9)))
    assert (
        command.main([f"--log={log}", "--quick", f"--json={tmp_path / 'plan'}", f"--plot={tmp_path / 'plot.png'}"]) == 0
    )
    assert "4 requests/s: 1 replicas, 24 GPU hours a day" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan").read_text())["rate"] == 4
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_request_that_cannot_fit_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rate=1", "--prompt=fixed:4000", "--output=fixed:200"]) == 1
    assert "a request has 4200 tokens, allowed: up to 4096" in capsys.readouterr().err


def test_a_file_without_steps_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rate=1", "--prompt=fixed:4", "--output=fixed:2"]
    assert command.main([*arguments, f"--steps={tmp_path / 'none'}"]) == 1
    (tmp_path / "other").write_text('{"benchmark": "streams"}')
    assert command.main([*arguments, f"--steps={tmp_path / 'other'}"]) == 1
    said = capsys.readouterr().err
    assert "none" in said
    assert "other: benchmark is 'streams', expected 'gpu'" in said
