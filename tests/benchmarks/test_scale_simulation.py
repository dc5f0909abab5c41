"""The simulation of autoscaling: nothing is lost, queues are those of theory, rules are Serve's."""

import importlib
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_delay_logic, replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "scale_simulation.py"
sys.path.append(str(SCRIPT.parent))  # scripts there import each other by their bare names
simulation: Any = importlib.import_module("scale_simulation")
fleet: Any = importlib.import_module("scale_fleet")
model: Any = importlib.import_module("scale_model")

SMALL = simulation.Setting(gpus=8, policy="ours", seconds=600.0)


def run(setting: Any) -> Any:
    return simulation.Simulation(setting).run()


@pytest.mark.parametrize("policy", simulation.POLICIES)
def test_every_request_ends_once_and_in_order(policy: str, monkeypatch: pytest.MonkeyPatch):
    ended: list[Any] = []
    end = simulation.Simulation._end

    def note(self: Any, request: Any) -> None:
        ended.append(request)
        end(self, request)

    monkeypatch.setattr(simulation.Simulation, "_end", note)
    setting = replace(SMALL, policy=policy)
    outcome = run(setting)
    assert outcome.arrived == outcome.ended == len(list(simulation.arrivals(setting)))
    assert len({id(r) for r in ended}) == outcome.ended > 1000
    for r in ended:
        unloaded = r.kind.prefill_s + r.kind.squares * model.SQUARE_S
        assert r.first - r.arrived >= unloaded - 1e-6
        assert r.last - r.first >= (r.output - 1) * model.STEP_S[1] - 1e-6


def test_a_run_is_its_seed():
    rows = [
        simulation.row_of(SMALL, run(replace(SMALL, seed=seed)), 3.0, 0.0) for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("part", ["prompts", "pictures"])
@pytest.mark.parametrize("use", [0.5, 0.8])
def test_one_replica_of_equal_work_waits_as_m_d_1_does(part: str, use: float):
    """The mean wait is use × service / (2 (1 - use)) (Pollaczek and Khinchine)."""
    kind = model.Kind(1.0, 8000) if part == "prompts" else model.Kind(1.0, 1, 0, 50)
    service_s = kind.prefill_s + kind.squares * model.SQUARE_S
    setting = simulation.Setting(
        gpus=2,  # a decoder and an encoder
        policy="fixed peak",
        seconds=40_000 * service_s,
        peak_rate=use / service_s,
        least_rate=1.0,
        burst=1.0,
        mix=(kind,),
        mean_output=1e-9,
    )
    found = run(setting).ttft_s
    expected = service_s + use * service_s / (2 * (1 - use))
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.08)


def test_alone_a_request_takes_the_measured_times():
    decoder = model.Decoder(1, 0.0)
    request = model.Request(0.0, model.Kind(1.0, 2048), 101)
    decoder.take(request, 0.0)
    while not request.last:
        decoder.run(decoder.next_event())
    assert request.first == pytest.approx(2048 * 225.7e-3 / 8192)
    assert request.interval_s == pytest.approx(4.13e-3, rel=0.02)  # RESULTS.md, 1 × 2k


def test_thirty_two_side_by_side_have_their_measured_interval():
    decoder = model.Decoder(1, 0.0)
    requests = [model.Request(0.0, model.Kind(1.0, 1048), 1000) for _ in range(32)]
    for request in requests:
        decoder.take(request, 0.0)
    while decoder.ongoing:
        decoder.run(decoder.next_event())
    # RESULTS.md, 32 × 2k; the first to start end while the last are still at it.
    assert requests[-1].interval_s == pytest.approx(6.50e-3, rel=0.1)


def test_more_requests_than_lanes_wait_for_one():
    decoder = model.Decoder(1, 0.0)
    for _ in range(model.LANES + 10):
        decoder.take(model.Request(0.0, model.Kind(1.0, 100), 50), 0.0)
    assert decoder.read_load(1e-3).lane_use == (model.LANES + 10) / model.LANES
    ended = 0
    while decoder.ongoing:
        ended += len(decoder.run(decoder.next_event()))
    assert ended == model.LANES + 10
    assert (decoder.free_lanes, decoder.free_kv) == (model.LANES, model.KV_TOKENS)


def test_arrivals_are_as_many_as_the_rate_says():
    setting = replace(SMALL, seconds=3600.0, burst=1.0)
    times = [at for at, _, _ in simulation.arrivals(setting)]
    assert times == sorted(times)
    mean = setting.peak * (1 + simulation.LEAST_RATE) / 2 * 3600
    assert abs(len(times) - mean) < 5 * math.sqrt(mean)


def test_our_policies_follow_the_load_and_cost_less_than_the_peak():
    ours, peak = (run(replace(SMALL, policy=p, seconds=1800.0)) for p in ("ours", "fixed peak"))
    assert ours.most_decoders > 2
    assert ours.gpu_s < 0.9 * peak.gpu_s
    assert ours.good > 0.8 * peak.good


def test_encoders_go_to_zero_and_no_picture_is_lost_on_the_way_back():
    mix = (model.Kind(0.97, 800), model.Kind(0.03, 100, 2861, 7))
    setting = replace(SMALL, mix=mix, peak_rate=0.2, seconds=6000.0)
    simulated = simulation.Simulation(setting)
    simulated.encoders._scaling.to_zero_delay_s = 30.0
    outcome = simulated.run()
    assert outcome.ended == outcome.arrived
    assert simulated.encoders.gpu_s < 0.8 * setting.seconds


class TestServesRules:
    def test_delays_are_serves(self):
        """A random walk of wishes, decided by both."""
        config = AutoscalingConfig(
            min_replicas=0,
            max_replicas=9,
            upscale_delay_s=10,
            downscale_delay_s=30,
            downscale_to_zero_delay_s=60,
        )
        scaling = fleet.Scaling(None, 0, 9, 10, 30, 60)
        rng, target = random.Random(0), 3
        state: dict[str, Any] = {}
        moves = 0
        wanted = target
        for second in range(0, 20_000, 2):
            if rng.random() < 0.08:
                wanted = rng.randint(0, 9)
            theirs, state = _apply_delay_logic(wanted, target, config, state, float(second))
            assert scaling.after_delay(wanted, target, float(second)) == theirs
            moves += theirs != target
            target = theirs
        assert moves > 100

    @pytest.mark.parametrize("requests", [0, 1, 7, 40])
    def test_the_default_policy_is_serves(self, requests: int):
        config = AutoscalingConfig(max_replicas=9, target_ongoing_requests=8)
        ctx: Any = SimpleNamespace(
            current_num_replicas=3,
            target_num_replicas=3,
            total_num_requests=requests,
            config=config,
        )
        assert fleet.OngoingPolicy(8)(ctx) == replica_queue_length_autoscaling_policy(ctx)

    def test_the_delays_are_those_of_the_shipped_file(self):
        text = (ROOT / "serve_config.yaml").read_text()
        for scaling in simulation.scalings(SMALL):
            assert f"upscale_delay_s: {scaling.upscale_delay_s:g}" in text
            assert f"downscale_delay_s: {scaling.downscale_delay_s:g}" in text
            assert f"look_back_period_s: {scaling.look_back_s:g}" in text


def test_the_script_prints_a_table_and_json():
    options = ["--gpus", "4", "--hours", "0.05", "--policies", "ours", "fixed mean"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    facts = json.loads(last)
    assert len(table) == 3
    assert facts["figure"] == "scale_simulation"
    assert [row["policy"] for row in facts["rows"]] == ["ours", "fixed mean"]
