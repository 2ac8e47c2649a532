"""Repetition caps: what happens when a domain has been read as often as it may be."""

import time

import numpy as np
import pytest

from mixwright.data_mixing.domain import Cap
from mixwright.data_mixing.errors import DomainExhausted
from mixwright.data_mixing.plan import Exhaustion, Plan
from tests.data_mixing.plan_cases import genesis, plan, policy, segment


def capped(max_epochs: float, on_exhaust: str = "renormalise") -> Cap:
    return Cap.model_validate({"max_epochs": max_epochs, "on_exhaust": on_exhaust})


def first_step_over(uncapped: Plan, domain: int, limit: int) -> int:
    """By walking: the first step whose rows would take the domain beyond its limit."""
    return next(step for step in range(10_000) if uncapped.cursors(step + 1)[domain] > limit)


def test_renormalise_gives_the_share_to_the_others_in_proportion_from_the_first_step_that_would_exceed() -> None:
    sizes, weights = [40, 1000, 1000], [2, 5, 3]
    event = first_step_over(plan(genesis(sizes), (0, policy(weights))), 0, 80)
    reader = plan(genesis(sizes, caps={0: capped(2)}), (0, policy(weights)))
    assert reader.exhaustion() == (Exhaustion("d0", event, 2, "renormalise"),)
    assert reader.proportions(event - 1).tolist() == pytest.approx([0.2, 0.5, 0.3], abs=1e-8)
    assert reader.proportions(event).tolist() == pytest.approx([0, 5 / 8, 3 / 8], abs=1e-8)
    assert reader.cursors(event)[0] == reader.cursors(event + 500)[0] <= 80
    assert reader.stop_step is None


def test_no_capped_domain_ever_exceeds_its_limit() -> None:
    caps = {0: capped(1), 1: capped(0.5), 2: capped(3.25), 3: capped(1.999)}
    reader = plan(
        genesis([17, 40, 33, 71, 5000], caps=caps), (0, policy([1, 1, 1, 1, 1])), (9, policy([5, 1, 0, 2, 1]))
    )
    limits = [17, 20, 107, 141]
    for step in range(120):
        drawn = np.bincount(reader.rows(step).domain_n, minlength=5)
        assert drawn.sum() == 32
        assert np.all(reader.cursors(step + 1)[:4] <= limits)
    assert len(reader.exhaustion()) >= 4


def test_a_limit_is_the_decimal_number_of_epochs_that_the_user_wrote() -> None:
    reader = plan(genesis([10, 1000], rows_per_step=1, caps={0: capped(0.3)}), (0, policy([1, 1])))
    assert reader.cursors(500)[0] == 3


def test_allow_repeats_without_end() -> None:
    reader = plan(genesis([10, 10], caps={0: capped(1, "allow")}), (0, policy([1, 1])))
    assert reader.exhaustion() == ()
    assert reader.rows(300).epoch_n.max() > 400


def test_stop_ends_the_plan_at_the_first_step_that_would_exceed() -> None:
    event = first_step_over(plan(genesis([40, 1000]), (0, policy([1, 1]))), 0, 100)
    reader = plan(genesis([40, 1000], caps={0: capped(2.5, "stop")}), (0, policy([1, 1])))
    assert reader.stop_step == event
    reader.rows(event - 1)
    for step in (event, event + 1, event + 10**6):
        with pytest.raises(
            DomainExhausted, match=rf"domain 'd0' reached max_epochs=2.5 at step {event} \(on_exhaust: stop"
        ):
            reader.rows(step)
    assert reader.cursors(event + 50).tolist() == reader.cursors(event).tolist()
    assert reader.proportions(event).tolist() == [0, 0]


def test_a_plan_of_which_every_domain_is_spent_ends_as_if_stopped() -> None:
    caps = {0: capped(1), 1: capped(2)}
    reader = plan(genesis([100, 50], caps=caps), (0, policy([1, 3])))
    assert [event.action for event in reader.exhaustion()] == ["renormalise", "renormalise", "stop"]
    stop = reader.stop_step
    assert stop is not None
    assert 200 - 64 <= reader.cursors(stop).sum() <= 200
    with pytest.raises(DomainExhausted):
        reader.rows(stop)


def test_a_later_segment_of_the_same_policy_leaves_a_spent_domain_out_and_stops_when_it_asks_for_nothing_else() -> None:
    program = policy(segment(0, [1, 1]), segment(50, [3, 1]), segment(60, [1, 0]))
    reader = plan(genesis([40, 10_000], caps={0: capped(1)}), (0, program))
    assert reader.proportions(50).tolist() == [0, 1]
    assert reader.stop_step == 60


def test_a_new_policy_may_raise_the_cap_and_the_domain_is_read_on() -> None:
    run = genesis([40, 1000], caps={0: capped(1)})
    reader = plan(run, (0, policy([1, 1])), (20, policy([1, 1], caps={"d0": capped(3)})))
    assert reader.proportions(19).tolist() == [0, 1]
    assert reader.proportions(20).tolist() == [0.5, 0.5]
    assert reader.cursors(20)[0] <= 40 < reader.cursors(1000)[0] <= 120
    assert [event.max_epochs for event in reader.exhaustion()] == [1, 3]


def test_a_new_policy_may_lower_the_cap_below_what_was_read() -> None:
    run = genesis([40, 1000])
    reader = plan(run, (0, policy([1, 1])), (20, policy([1, 1], caps={"d0": capped(2)})))
    assert reader.cursors(20)[0] == 320
    assert reader.proportions(20).tolist() == [0, 1]
    stopped = plan(run, (0, policy([1, 1])), (20, policy([1, 1], caps={"d0": capped(2, "stop")})))
    assert stopped.stop_step == 20


def test_a_domain_that_is_not_asked_for_cannot_stop_the_plan() -> None:
    run = genesis([40, 1000], caps={0: capped(1, "stop")})
    reader = plan(run, (0, policy([1, 1], caps={"d0": capped(9)})), (10, policy([0, 1])))
    assert reader.cursors(10)[0] == 160
    assert reader.stop_step is None


def test_a_commit_before_the_stop_averts_it_and_one_behind_it_goes_on_from_there() -> None:
    run = genesis([40, 1000], caps={0: capped(1, "stop")})
    stopped = plan(run, (0, policy([1, 1])))
    stop = stopped.stop_step
    assert stop is not None
    averted = plan(run, (0, policy([1, 1])), (stop, policy([0, 1])))
    assert averted.stop_step is None
    assert averted.cursors(stop).tolist() == stopped.cursors(stop).tolist()
    later = plan(run, (0, policy([1, 1])), (stop + 7, policy([0, 1])))
    assert later.stop_step == stop
    assert later.cursors(stop + 8).sum() == stopped.cursors(stop).sum() + 32


def test_when_two_domains_are_spent_in_one_step_stop_has_precedence() -> None:
    caps = {0: capped(1), 1: capped(1, "stop")}
    reader = plan(genesis([100, 100, 1000], caps=caps), (0, policy([1, 1, 1])))
    assert reader.stop_step == reader.exhaustion()[0].step
    assert {event.domain for event in reader.exhaustion()} == {"d0", "d1"}


def test_a_domain_that_is_spent_only_because_another_was_goes_in_the_same_step() -> None:
    """d0's share makes d1 exceed its cap in the very step that d0 leaves."""
    caps = {0: capped(1), 1: capped(1)}
    reader = plan(genesis([32 * 4 + 10, 160, 10_000], caps=caps), (0, policy([0.5, 0.4, 0.1])))
    events = reader.exhaustion()
    for step in range(events[0].step, events[-1].step + 3):
        assert np.all(reader.cursors(step + 1)[:2] <= [138, 160])
    assert [event.domain for event in events] == ["d0", "d1"]


def test_random_access_beyond_an_event_equals_walking_through_it() -> None:
    def build() -> Plan:
        caps = {i: capped(1 + i / 3) for i in range(6)}
        return plan(genesis([50 + 9 * i for i in range(6)] + [9999], caps=caps), (0, policy([7, 6, 5, 4, 3, 2, 1])))

    walked, steps = build(), range(80)
    digests = [walked.digest(step) for step in steps]
    jumped = build()
    assert [jumped.digest(step) for step in reversed(steps)] == digests[::-1]
    assert [build().digest(step) for step in (79, 40)] == [digests[79], digests[40]]


def test_a_forecast_looks_as_far_as_it_is_asked_to() -> None:
    reader = plan(genesis([40, 4000], num_steps=10, caps={0: capped(2), 1: capped(3)}), (0, policy([1, 1])))
    assert [event.domain for event in reader.exhaustion()] == ["d0"]
    assert reader.exhaustion(before_step=3) == ()
    assert [event.domain for event in reader.exhaustion(before_step=10**6)] == ["d0", "d1", "d1"]
    assert reader.stop_step is None, "the run is over before the plan is"


def test_from_a_step_on_only_the_stretch_that_covers_it_and_later_ones_are_told() -> None:
    caps = {0: capped(1), 1: capped(2), 2: capped(3)}
    reader = plan(genesis([400, 400, 400, 9000], caps=caps), (0, policy([1, 1, 1, 1])))
    everything = reader.exhaustion(600)
    assert len(everything) == 3
    for step in (0, *(event.step - 1 for event in everything), *(event.step for event in everything)):
        told = reader.exhaustion(600, from_step=step)
        started = max((event.step for event in everything if event.step <= step), default=0)
        assert told == tuple(event for event in everything if event.step >= started)


def test_ten_thousand_capped_domains_are_forecast_in_reasonable_time() -> None:
    size = 10_000
    caps = {i: capped(1) for i in range(0, size, 500)}
    run = genesis([2000 + i for i in range(size)], rows_per_step=4096, num_steps=20_000, caps=caps)
    reader = plan(run, (0, policy(1 / np.arange(1, size + 1))))
    started = time.perf_counter()
    events = reader.exhaustion()
    assert time.perf_counter() - started < 5
    assert [event.domain for event in events[:2]] == ["d0", "d500"]
    assert [event.step for event in events] == sorted(event.step for event in events)


def test_a_forecast_is_the_same_however_often_and_from_wherever_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches that were forgotten are derived again from kept states; their events must not get lost."""
    monkeypatch.setattr("mixwright.data_mixing.timeline._RECENT_STRETCHES", 1)
    caps = {i: capped(1 + i / 3) for i in range(6)} | {6: capped(1, "stop")}
    reader = plan(genesis([50 + 9 * i for i in range(6)] + [999], caps=caps), (0, policy([7, 6, 5, 4, 3, 2, 1])))
    events = reader.exhaustion()
    assert len(events) == 7
    for step in (0, 30, 7, events[3].step, events[-1].step - 1, 1):
        reader.rows(step)
        assert reader.exhaustion() == events
    copied = Plan(reader.genesis, reader.commits, known=[reader.state(event.step) for event in events])
    assert copied.exhaustion() == events
