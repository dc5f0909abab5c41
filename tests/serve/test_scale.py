"""How many replicas: what the policies ask for, as Serve's own context tells them the load."""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from xc_ray.config import POLICIES
from xc_ray.serve import scale
from xc_ray.serve.scale import RATE, DecoderLoad, DecoderPolicy, EncoderLoad, EncoderPolicy

Load = DecoderLoad | EncoderLoad
Policy = DecoderPolicy | EncoderPolicy

NOW = 1_000_000.0
OURS = DeploymentID("Decoder", "xc_ray")
IDLE = DecoderLoad(0.0, 0.0, 0.0, 0.0, 30_000.0)
IDLE_ENCODER = EncoderLoad(0.0, 0.0, 200.0)


def context(
    loads: Sequence[Load | None],
    *,
    target: int | None = None,
    requests: float = 0.0,
    queued: float = 0.0,
    age_s: float = 1.0,
    state: dict[str, Any] | None = None,
    **config: Any,
) -> AutoscalingContext:
    """What Serve's controller hands a policy while so many replicas run; None has not reported."""
    replicas = [ReplicaID(f"r{i}", OURS) for i in range(len(loads))]
    told = [(r, load._asdict()) for r, load in zip(replicas, loads, strict=True) if load]
    names = told[0][1] if told else {}
    return AutoscalingContext(
        deployment_id=OURS,
        deployment_name=OURS.name,
        app_name=OURS.app_name,
        current_num_replicas=len(loads),
        target_num_replicas=len(loads) if target is None else target,
        running_replicas=replicas,
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics={n: {r: values[n] for r, values in told} for n in names},
        raw_metrics={
            n: {r: [TimeStampedValue(NOW - age_s, values[n])] for r, values in told} for n in names
        },
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=1000,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW,
        config=config_of(**config),
    )


@cache
def config_of(**config: Any) -> AutoscalingConfig:
    """Takes milliseconds to make, and thousands are asked for."""
    return AutoscalingConfig(max_replicas=1000, **config)


def wanted(policy: Policy, *args: Any, **kwargs: Any) -> int:
    """Replicas, rounded up as Serve does it."""
    return math.ceil(policy(context(*args, **kwargs))[0])


amounts = st.floats(0, 1e5)
shares = st.floats(0, 1.5)
decoder_loads = st.builds(DecoderLoad, shares, shares, shares, amounts, st.floats(1e3, 1e5))
encoder_loads = st.builds(EncoderLoad, amounts, shares, st.floats(10, 1e3))


class TestDecoderPolicy:
    policy = DecoderPolicy(target_use=0.8, target_prefill_use=0.5, target_wait_s=2.0)

    @pytest.mark.parametrize(
        ("load", "replicas"),
        [
            (IDLE, 0),
            (IDLE._replace(kv_use=0.8), 2),
            (IDLE._replace(kv_use=0.81), 3),
            (IDLE._replace(lane_use=2.0), 5),  # requests wait for lanes, with room in the cache
            (IDLE._replace(prefill_use=1.0), 4),
            (IDLE._replace(waiting_tokens=120_000.0), 4),  # 60,000 in two seconds each
        ],
    )
    def test_each_signal_alone_asks_for_what_it_needs(self, load: DecoderLoad, replicas: int):
        assert wanted(self.policy, [load, load]) == replicas

    def test_the_largest_need_counts_and_not_their_sum(self):
        load = DecoderLoad(0.8, 0.8, 0.5, 60_000.0, 30_000.0)
        assert wanted(self.policy, [load] * 5) == 5

    def test_the_rate_is_the_mean_of_those_that_know_theirs(self):
        slow = IDLE._replace(waiting_tokens=120_000.0, prefill_tokens_per_s=10_000.0)
        fresh = IDLE._replace(prefill_tokens_per_s=0.0)
        assert wanted(self.policy, [slow, fresh]) == 6
        assert wanted(self.policy, [slow, IDLE]) == 3

    def test_the_last_rate_is_remembered_while_nobody_knows_one(self):
        _, state = self.policy(context([IDLE]))
        fresh = IDLE._replace(prefill_tokens_per_s=0.0, waiting_tokens=180_000.0)
        assert wanted(self.policy, [fresh], state=state) == 3
        assert wanted(self.policy, [fresh], requests=9.0) == 1  # no rate, so the queue says nothing

    @settings(deadline=None)  # cores are shared
    @given(st.lists(decoder_loads, min_size=1, max_size=6))
    def test_never_below_the_need_nor_far_above_it(self, loads: list[DecoderLoad]):
        rate = sum(load.prefill_tokens_per_s for load in loads) / len(loads)
        need = max(
            *(sum(load[i] for load in loads) / (0.8, 0.8, 0.5)[i] for i in range(3)),
            sum(load.waiting_tokens for load in loads) / (rate * 2.0),
        )
        want, state = self.policy(context(loads))
        assert want == pytest.approx(need, abs=1e-5)
        assert state == {RATE: pytest.approx(rate)}

    @settings(deadline=None)  # cores are shared
    @given(st.lists(decoder_loads, min_size=1, max_size=6), st.integers(0, 3), amounts)
    def test_more_load_never_asks_for_fewer(
        self, loads: list[DecoderLoad], which: int, more: float
    ):
        grown = loads[0]._replace(**{DecoderLoad._fields[which]: loads[0][which] + more})
        before, _ = self.policy(context(loads))
        after, _ = self.policy(context([grown, *loads[1:]]))
        assert after >= before


class TestEncoderPolicy:
    policy = EncoderPolicy(target_wait_s=1.0, target_use=0.7)

    @pytest.mark.parametrize(
        ("load", "replicas"),
        [
            (IDLE_ENCODER, 0),
            (IDLE_ENCODER._replace(tiles=1.0), 1),
            (IDLE_ENCODER._replace(tiles=201.0), 3),
            (IDLE_ENCODER._replace(use=0.7), 2),
            (IDLE_ENCODER._replace(use=1.0), 3),  # never fewer than arrives, short as queues are
        ],
    )
    def test_queue_and_use_ask_for_what_they_need(self, load: EncoderLoad, replicas: int):
        assert wanted(self.policy, [load, load]) == replicas

    def test_pictures_that_wait_at_decoders_count_like_those_here(self):
        load = IDLE_ENCODER._replace(tiles=200.0)  # of 8 pictures: 25 each
        assert wanted(self.policy, [load], requests=24.0, queued=16.0) == 3

    def test_a_queued_picture_has_a_tile_at_least(self):
        assert wanted(self.policy, [IDLE_ENCODER], requests=500.0, queued=500.0) == 3

    def test_without_a_rate_one_stays_for_whatever_waits(self):
        fresh = EncoderLoad(5000.0, 0.0, 0.0)
        assert wanted(self.policy, [fresh], requests=8.0) == 1

    @settings(deadline=None)  # cores are shared
    @given(st.lists(encoder_loads, min_size=1, max_size=6), st.integers(0, 1), amounts)
    def test_more_load_never_asks_for_fewer(
        self, loads: list[EncoderLoad], which: int, more: float
    ):
        grown = loads[0]._replace(**{EncoderLoad._fields[which]: loads[0][which] + more})
        before, _ = self.policy(context(loads))
        after, _ = self.policy(context([grown, *loads[1:]]))
        assert after >= before

    @settings(deadline=None)  # cores are shared
    @given(st.lists(encoder_loads, min_size=1, max_size=6))
    def test_never_below_the_need(self, loads: list[EncoderLoad]):
        rate = sum(load.tiles_per_s for load in loads) / len(loads)
        want, _ = self.policy(context(loads))
        assert want >= sum(load.tiles for load in loads) / rate - 1e-5
        assert want >= sum(load.use for load in loads) / 0.7 - 1e-5


BOTH = pytest.mark.parametrize(
    ("policy", "idle"), [(DecoderPolicy(), IDLE), (EncoderPolicy(), IDLE_ENCODER)]
)


@BOTH
class TestWhatIsNotKnown:
    def test_a_replica_that_has_not_reported_keeps_the_target(self, policy: Policy, idle: Load):
        assert wanted(policy, [None]) == 1
        assert wanted(policy, [None, None]) == 2
        assert wanted(policy, [None, None], target=5) == 5  # nothing is known of any

    def test_it_counts_as_full_and_the_others_as_they_are(self, policy: Policy, idle: Load):
        assert wanted(policy, [idle] * 9 + [None]) == 1

    def test_it_never_raises_the_target(self, policy: Policy, idle: Load):
        full = idle._replace(**{idle._fields[1]: 1.0})
        want = wanted(policy, [full] * 8)
        assert wanted(policy, [full] * 8 + [None] * (want - 8)) == want

    def test_replicas_on_their_way_do_not_matter_once_all_that_run_have_reported(
        self, policy: Policy, idle: Load
    ):
        assert wanted(policy, [idle], target=4) == 0
        assert wanted(policy, [idle, None], target=4) == 3

    def test_an_old_report_is_none(self, policy: Policy, idle: Load):
        assert wanted(policy, [idle] * 3, age_s=59) == 0
        assert wanted(policy, [idle] * 3, age_s=61) == 3

    def test_a_report_that_is_no_number_is_none(self, policy: Policy, idle: Load):
        broken = idle._replace(**{idle._fields[0]: math.nan})
        assert wanted(policy, [idle, broken]) == 1

    def test_a_report_without_one_of_its_values_is_none(self, policy: Policy, idle: Load):
        ctx = context([idle, idle])
        (ctx.aggregated_metrics or {})[idle._fields[1]].clear()
        assert policy(ctx)[0] == 2

    def test_empty_metrics_are_none(self, policy: Policy, idle: Load):
        ctx = context([None, None])
        ctx._aggregated_metrics_value = ctx._raw_metrics_value = None
        assert policy(ctx)[0] == 2

    def test_nothing_runs_and_nobody_asks(self, policy: Policy, idle: Load):
        assert wanted(policy, []) == 0
        assert wanted(policy, [], target=2) == 2  # on their way

    def test_a_request_wakes_one(self, policy: Policy, idle: Load):
        assert wanted(policy, [], requests=1.0) == 1
        assert wanted(policy, [], requests=0.05, target=0) == 1

    def test_one_stays_while_requests_are_there(self, policy: Policy, idle: Load):
        assert wanted(policy, [idle], requests=0.01) == 1

    def test_the_rate_outlasts_the_last_replica(self, policy: Policy, idle: Load):
        _, state = policy(context([idle]))
        _, state = policy(context([], state=state))
        assert state == {RATE: idle[-1]}


@BOTH
@settings(deadline=None)  # cores are shared
@given(data=st.data())
def test_a_missing_report_never_asks_for_fewer_than_full_ones_nor_lifts_over_the_target(
    policy: Policy, idle: Load, data: st.DataObject
):
    drawn = decoder_loads if isinstance(policy, DecoderPolicy) else encoder_loads
    loads: list[Any] = data.draw(st.lists(drawn, max_size=6))
    missing = data.draw(st.integers(0, 4))
    target = data.draw(st.integers(1, 12))
    assume(loads or missing)
    known = policy(context(loads, target=target))[0] if loads else 0.0
    want = policy(context([*loads, *[None] * missing], target=target))[0]
    if missing:
        assert want >= min(target, known + missing) - 1e-5
        assert want <= max(known, target) + 1e-5
    else:
        assert want == known


class TestInServe:
    def serve(self, policy: Policy, **config: Any) -> Callable[..., int]:
        """The policy with Serve's delays and factors around it, told the time in seconds."""
        wrapped = _apply_autoscaling_config(policy)
        state: dict[str, Any] = {}

        def decide(now: float, loads: Sequence[Load | None], **more: Any) -> int:
            nonlocal state
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("time.time", lambda: NOW + now)
                number, state = wrapped(context(loads, state=state, **more, **config))
            return number

        return decide

    def test_delays_are_applied_around_it_and_a_break_starts_them_anew(self):
        decide = self.serve(DecoderPolicy(), upscale_delay_s=10, downscale_delay_s=60)
        full, half = IDLE._replace(kv_use=1.0), IDLE._replace(kv_use=0.5)
        assert [decide(t, [full]) for t in (0, 5)] == [1, 1]
        assert decide(6, [half]) == 1
        assert [decide(t, [full]) for t in (7, 16, 17)] == [1, 1, 2]
        assert [decide(t, [IDLE._replace(kv_use=0.1)] * 2) for t in (20, 79, 80)] == [2, 2, 1]

    def test_to_zero_after_its_own_delay_and_back_at_once(self):
        decide = self.serve(EncoderPolicy(), downscale_delay_s=10, downscale_to_zero_delay_s=30)
        assert [decide(t, [IDLE_ENCODER]) for t in (0, 29, 30)] == [1, 1, 0]
        assert decide(40, []) == 0
        assert decide(41, [], requests=1.0) == 1
        assert decide(42, [], requests=1.0, target=1) == 1

    @pytest.mark.parametrize("name", list(POLICIES))
    def test_it_is_pickled_by_value_and_made_with_its_kwargs(self, name: str):
        kwargs = {"target_use": 0.5}
        policy = AutoscalingPolicy(policy_function=name, policy_kwargs=kwargs)
        data = policy.get_serialized_policy_def()
        assert data
        made = cloudpickle.loads(data)(**kwargs)
        assert made.__call__.__globals__ is not vars(scale)  # not by reference
        assert made.target_use == 0.5
        idle = IDLE if "Decoder" in name else IDLE_ENCODER
        assert made(context([idle]))[0] == 0

    @pytest.mark.parametrize("name", list(POLICIES))
    def test_the_configuration_knows_its_kwargs_and_defaults(self, name: str):
        module, _, attribute = name.partition(":")
        parameters = inspect.signature(getattr(sys.modules[module], attribute)).parameters
        fields = POLICIES[name].model_fields
        assert {n: p.default for n, p in parameters.items()} == {
            n: field.default for n, field in fields.items()
        }

    @pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            (kind, name)
            for kind in (DecoderPolicy, EncoderPolicy)
            for name in inspect.signature(kind).parameters
        ],
    )
    def test_a_target_that_is_none_is_refused(self, kind: type[Any], name: str, value: float):
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})
