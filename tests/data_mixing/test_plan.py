"""Contract 1: the ordered batch of a step is a pure function of the commits, whoever asks, in whatever pieces."""

import concurrent.futures
import dataclasses
import itertools
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.data_mixing.errors import MixingError
from mixwright.data_mixing.plan import (
    CommittedPolicy,
    Plan,
    RowRefs,
    chain_digest,
    rank_positions,
    rows_digest,
    run_digest,
)
from tests.data_mixing.plan_cases import changing_plan, genesis, ordered, plan, policy, segment

NUM_STEPS = 160
WORLDS = [1, 2, 4, 8, 16, 64]


@pytest.fixture(scope="module")
def whole_run() -> list[list[tuple[int, int, int, int]]]:
    """The ordered batches of a run with 40 policy changes, asked for one after another."""
    reference = changing_plan()
    return [ordered(reference.rows(step)) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_in_order_make_up_the_same_ordered_batch_for_any_world(world: int, whole_run: list) -> None:
    ranks = [changing_plan() for _ in range(world)]
    for step in range(0, NUM_STEPS, 1 if world < 4 else 3 if world < 16 else 13):
        slices = [ordered(ranks[rank].rows(step, rank_positions(64, rank, world))) for rank in range(world)]
        assert list(itertools.chain(*slices)) == whole_run[step], step


@pytest.mark.parametrize(("world", "accumulation"), [(1, 64), (2, 4), (4, 16), (8, 2)])
def test_micro_batches_in_order_make_up_the_same_ordered_batch(world: int, accumulation: int, whole_run: list) -> None:
    asked = changing_plan()
    for step in range(0, NUM_STEPS, 9):
        batch = []
        for rank in range(world):
            mine = rank_positions(64, rank, world)
            for first in range(mine.start, mine.stop, len(mine) // accumulation):
                batch += ordered(asked.rows(step, range(first, first + len(mine) // accumulation)))
        assert batch == whole_run[step], step


def test_a_world_that_does_not_divide_the_batch_still_covers_it_in_order(whole_run: list) -> None:
    asked = changing_plan()
    for world in (3, 7, 48, 100):
        slices = [ordered(asked.rows(50, rank_positions(64, rank, world))) for rank in range(world)]
        assert list(itertools.chain(*slices)) == whole_run[50]


def test_random_access_backwards_gives_the_same_batches_as_reading_forwards(whole_run: list) -> None:
    asked = changing_plan()
    backwards = {step: ordered(asked.rows(step)) for step in reversed(range(NUM_STEPS))}
    assert [backwards[step] for step in range(NUM_STEPS)] == whole_run


def test_a_fresh_plan_for_every_step_gives_the_same_batches(whole_run: list) -> None:
    for step in (159, 3, 80, 0, 77, 158):
        assert ordered(changing_plan().rows(step)) == whole_run[step]


def test_a_plan_that_grows_commit_by_commit_is_the_plan_of_all_commits(whole_run: list) -> None:
    complete = changing_plan()
    growing = Plan(complete.genesis, complete.commits[:1])
    for commit in complete.commits[1:]:
        first = commit.effective_step - 4
        assert [ordered(growing.rows(step)) for step in range(first, first + 4)] == whole_run[first : first + 4]
        growing.rows(commit.effective_step + 3)  # read ahead of the commit, as a prefetching rank does
        growing = growing.extended(commit)
    assert [ordered(growing.rows(step)) for step in range(NUM_STEPS)] == whole_run
    assert growing.commits == complete.commits


def test_a_commit_in_the_middle_of_a_program_that_was_read_ahead_of_it_holds_at_once() -> None:
    """States beyond the effective step, which were derived before the commit was known, are no longer true."""
    run = genesis([100, 200, 300])
    ramp = policy(*(segment(step, [step + 1, 50, 100 - step]) for step in range(100)))
    read_ahead = plan(run, (0, ramp))
    for step in range(100):
        read_ahead.rows(step)
    late = CommittedPolicy(40, 2, policy([5, 1, 1]))
    fresh = Plan(run, (*read_ahead.commits, late))
    extended = read_ahead.extended(late)
    assert [extended.digest(step) for step in range(99, 30, -1)] == [fresh.digest(step) for step in range(99, 30, -1)]


def test_extending_derives_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixwright.data_mixing.timeline import Timeline

    derived: list[int] = []
    derive = Timeline._derive
    monkeypatch.setattr(Timeline, "_derive", lambda self, state: derived.append(state.step) or derive(self, state))
    growing = changing_plan()
    growing.rows(NUM_STEPS)
    derived.clear()
    longer = growing.extended(CommittedPolicy(NUM_STEPS + 10, 99, policy(np.ones(12))))
    longer.rows(NUM_STEPS + 9)
    assert derived == []
    longer.rows(NUM_STEPS + 10)
    assert derived == [NUM_STEPS + 10]


def test_threads_that_share_a_plan_read_the_same_batches(whole_run: list) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        shared = changing_plan()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            steps = [int(step) for step in np.random.default_rng(0).permutation(NUM_STEPS)] * 3
            assert list(pool.map(lambda step: ordered(shared.rows(step)), steps)) == [whole_run[step] for step in steps]
    finally:
        sys.setswitchinterval(interval)


def test_a_plan_can_be_pickled(whole_run: list) -> None:
    copied = pickle.loads(pickle.dumps(changing_plan()))
    assert ordered(copied.rows(101)) == whole_run[101]


def test_a_catalogue_in_another_order_reads_the_same_rows() -> None:
    run = genesis([50, 60, 70, 80])
    turned = run.model_copy(update={"domains": run.domains[::-1]})
    mine, other = plan(run, (0, policy([1, 2, 3, 4]))), plan(turned, (0, policy([4, 3, 2, 1])))
    for step in range(40):
        rows, turned_rows = mine.rows(step), other.rows(step)
        assert [run.domains[d].name for d in rows.domain_n] == [turned.domains[d].name for d in turned_rows.domain_n]
        assert np.array_equal(rows.row_n, turned_rows.row_n)
        assert mine.digest(step) == other.digest(step)
    assert mine.cursors(40).tolist() == other.cursors(40).tolist()[::-1]
    assert mine.state_digest(40) == other.state_digest(40)


def test_the_order_inside_a_domain_does_not_depend_on_the_others() -> None:
    alone, among = genesis([40]), genesis([40, 50, 60])
    mixed = plan(among, (0, policy([1, 2, 3])))
    lonely = plan(alone, (0, policy([1])))
    rows_alone = [row for step in range(5) for _, _, _, row in ordered(lonely.rows(step))]
    draws = mixed.rows(0)
    first = mixed.cursors(1)[0]
    assert sorted(draws.row_n[draws.domain_n == 0].tolist()) != list(range(first))
    mixed_rows = {row for step in range(6) for _, d, epoch, row in ordered(mixed.rows(step)) if (d, epoch) == (0, 0)}
    cursor = int(mixed.cursors(6)[0])
    assert cursor < 40
    # One step of the lonely run draws 32 rows in slot order; the first `cursor` of the epoch are the same ones.
    from mixwright.data_mixing.permutation import mix_key, permute

    order = permute(np.arange(40), 40, mix_key(2, among.seed, among.domains[0].id, 0)).tolist()
    assert mixed_rows == set(order[:cursor])
    assert set(rows_alone[:32]) == set(order[:32])


def test_every_epoch_reads_every_row_exactly_once_and_in_a_new_order() -> None:
    reader = changing_plan()
    read: dict[tuple[int, int], list[int]] = {}
    for step in range(400):
        for _, domain, epoch, row in ordered(reader.rows(step)):
            read.setdefault((domain, epoch), []).append(row)
    complete = 0
    for (domain, epoch), rows in read.items():
        size = reader.genesis.domains[domain].num_rows
        assert len(set(rows)) == len(rows), "a row was read twice in an epoch"
        if (domain, epoch + 1) in read:
            assert sorted(rows) == list(range(size)), "an epoch ended with rows unread"
            assert epoch == 0 or rows != read[domain, epoch - 1]
            complete += 1
    assert complete > 100


def test_cursors_are_the_rows_read_before_a_step() -> None:
    reader = changing_plan()
    counted = np.zeros(12, np.int64)
    for step in range(NUM_STEPS):
        assert np.array_equal(reader.cursors(step), counted), step
        counted += np.bincount(reader.rows(step).domain_n, minlength=12)


def test_rows_stay_near_what_was_requested_at_every_step_of_a_changing_run() -> None:
    reader = changing_plan(num_changes=100)
    requested, worst = np.zeros(12), 0.0
    for step in range(440):
        worst = max(worst, float(np.abs(reader.cursors(step) - requested).max()))
        requested += 64 * reader.proportions(step)
    assert worst <= 5


def test_no_domain_is_starved_and_one_that_rests_is_not_drawn() -> None:
    reader = changing_plan()
    for step in range(NUM_STEPS):
        drawn = np.bincount(reader.rows(step).domain_n, minlength=12)
        share = reader.proportions(step)
        assert not drawn[share == 0].any()
        assert np.abs(drawn - 64 * share).max() <= 5


def test_placement_in_the_batch_is_shuffled_by_step() -> None:
    reader = plan(genesis([1000, 1000], rows_per_step=64), (0, policy([1, 1])))
    places = [tuple(reader.rows(step).domain_n.tolist()) for step in range(50)]
    assert len(set(places)) == 50
    assert 20 < np.mean([[i for i, d in enumerate(place) if d == 0] for place in places]) < 43


def test_the_seed_changes_the_order_and_not_the_counts() -> None:
    one, two = (plan(genesis([100, 200], seed=seed), (0, policy([1, 3]))) for seed in (1, 2))
    assert ordered(one.rows(3)) != ordered(two.rows(3))
    assert one.cursors(9).tolist() == two.cursors(9).tolist()


def test_a_later_commit_supersedes_an_earlier_one_from_its_effective_step_on() -> None:
    run = genesis([100, 100])
    left, right, both = policy([1, 0]), policy([0, 1]), policy([1, 1])
    late = plan(run, (0, left), (10, right), (5, both))
    assert late.proportions(4).tolist() == [1, 0]
    assert late.proportions(5).tolist() == late.proportions(50).tolist() == [0.5, 0.5]
    twice = plan(run, (0, left), (10, right), (10, both))
    assert twice.proportions(9).tolist() == [1, 0]
    assert twice.proportions(10).tolist() == [0.5, 0.5]
    assert [twice.policy_lsn(step) for step in (0, 9, 10, 99)] == [1, 1, 3, 3]


def test_segments_are_absolute_steps_clipped_at_the_effective_step() -> None:
    run = genesis([100, 100])
    program = policy(segment(0, [1, 0]), segment(4, [3, 1]), segment(8, [0, 1]))
    reader = plan(run, (0, policy([1, 1])), (6, program))
    assert [reader.proportions(step)[0] for step in (5, 6, 7, 8)] == [0.5, 0.75, 0.75, 0]


def test_committing_the_same_mixture_again_changes_nothing() -> None:
    once = plan(genesis([60, 70, 80]), (0, policy([1, 2, 4])))
    again = plan(genesis([60, 70, 80]), *((step, policy([1, 2, 4])) for step in (0, 3, 4, 11)))
    assert [once.digest(step) for step in range(20)] == [again.digest(step) for step in range(20)]
    assert once.state_digest(20) == again.state_digest(20)


def test_counting_afresh_after_two_to_the_thirty_rows_is_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    long = changing_plan()
    digests = [long.digest(step) for step in (*range(150, 170), 500, 1000)]
    monkeypatch.setattr("mixwright.data_mixing.timeline.MAX_ROWS", 64 * 3)
    short = changing_plan()
    assert [short.digest(step) for step in (*range(150, 170), 500, 1000)] == digests


def test_steps_of_the_far_future_are_exact() -> None:
    """A trillion rows: counts are still exact, in order, and read quickly."""
    run = genesis([10**9 + 7, 10**8, 3], rows_per_step=1 << 16)
    reader = plan(run, (0, policy([0.7, 0.2, 0.1])))
    step = 10**12 // (1 << 16)
    before, after = reader.cursors(step), reader.cursors(step + 1)
    assert before.sum() == step << 16
    assert (after - before).sum() == 1 << 16
    requested = np.array([int(p * 2**31) for p in reader.proportions(step)], dtype=object) * (step << 16)
    assert max(abs(int(b) * 2**31 - r) for b, r in zip(before, requested, strict=True)) <= 2 << 31
    epochs = reader.rows(step).epoch_n
    assert epochs.max() == int(after[2]) // 3 or epochs.max() == (int(after[2]) - 1) // 3


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_log_gives_exact_disjoint_reproducible_batches(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=9))
    weights = st.lists(st.integers(0, 50), min_size=len(sizes), max_size=len(sizes)).filter(any)
    steps = [0, *sorted(data.draw(st.lists(st.integers(0, 20), max_size=5)))]
    run = genesis(sizes, rows_per_step=data.draw(st.integers(1, 40)), seed=data.draw(st.integers(0, 2**63 - 1)))
    commits = [(step, policy(data.draw(weights))) for step in steps]
    reader, other = plan(run, *commits), plan(run, *commits)
    seen: set[tuple[int, int, int]] = set()
    for step in range(24):
        batch = ordered(reader.rows(step))
        assert [position for position, *_ in batch] == list(range(run.rows_per_step))
        rows = {(domain, epoch, row) for _, domain, epoch, row in batch}
        assert len(rows) == len(batch)
        assert not rows & seen
        seen |= rows
    step = data.draw(st.integers(0, 23))
    assert ordered(other.rows(step)) == ordered(reader.rows(step))


def test_the_digest_of_the_batch_is_the_sum_of_the_digests_of_the_ranks() -> None:
    reader = changing_plan()
    for world in WORLDS:
        shares = [rows_digest(reader.genesis, 21, reader.rows(21, rank_positions(64, r, world))) for r in range(world)]
        assert sum(shares) % 2**64 == reader.digest(21)


def _swapped(refs: RowRefs, first: int, second: int) -> RowRefs:
    """The batch with two rows exchanged, positions staying."""
    order = np.arange(len(refs.row_n))
    order[[first, second]] = order[[second, first]]
    changed = {name: getattr(refs, name)[order] for name in ("domain_n", "epoch_n", "row_n")}
    return dataclasses.replace(refs, **changed)


def _subset(refs: RowRefs, keep: np.ndarray) -> RowRefs:
    return RowRefs(*(getattr(refs, field.name)[keep] for field in dataclasses.fields(refs)))


def test_the_digest_catches_every_way_to_read_a_step_wrongly() -> None:
    reader = changing_plan()
    refs, right = reader.rows(9), reader.digest(9)
    wrong = {"another step": rows_digest(reader.genesis, 10, refs), "the next batch": reader.digest(10)}
    everything = np.arange(64)
    for position in range(64):
        wrong[f"without {position}"] = rows_digest(reader.genesis, 9, _subset(refs, np.delete(everything, position)))
        doubled = everything.copy()
        doubled[position] = (position + 1) % 64
        wrong[f"{position} lost, its neighbour twice"] = rows_digest(reader.genesis, 9, _subset(refs, doubled))
        wrong[f"{position} again"] = rows_digest(reader.genesis, 9, _subset(refs, np.append(everything, position)))
        for other in range(position):
            wrong[f"{position} and {other} swapped"] = rows_digest(reader.genesis, 9, _swapped(refs, position, other))
        for name in ("domain_n", "epoch_n", "row_n"):
            values = getattr(refs, name).copy()
            values[position] ^= 1
            changed = dataclasses.replace(refs, **{name: values})
            wrong[f"{name} of {position}"] = rows_digest(reader.genesis, 9, changed)
    assert right not in wrong.values()
    assert len(set(wrong.values())) == len(wrong)


def test_the_run_digest_is_incremental_and_depends_on_the_order_of_steps() -> None:
    reader = changing_plan()
    whole = run_digest(reader, 30)
    assert run_digest(reader, 30, first_step=12, previous=run_digest(reader, 12)) == whole
    assert run_digest(reader, 0) == 0
    one, two = reader.digest(0), reader.digest(1)
    assert chain_digest(chain_digest(0, one), two) != chain_digest(chain_digest(0, two), one)
    shifted = chain_digest(chain_digest(0, two), reader.digest(2))
    assert shifted != run_digest(reader, 2)


def test_state_digest_is_the_same_before_and_after_its_commit_is_added() -> None:
    reader = changing_plan()
    longer = reader.extended(CommittedPolicy(NUM_STEPS, 99, policy(np.ones(12))))
    assert reader.state_digest(NUM_STEPS) == longer.state_digest(NUM_STEPS)
    assert reader.state_digest(NUM_STEPS) != reader.state_digest(NUM_STEPS - 1)
    assert reader.state_digest(NUM_STEPS + 1) != longer.state_digest(NUM_STEPS + 1)


def test_known_states_save_the_way_there_and_change_nothing(whole_run: list) -> None:
    walked = changing_plan()
    state = walked.state(120)
    resumed = Plan(walked.genesis, walked.commits, known=(state,))
    assert [ordered(resumed.rows(step)) for step in range(120, NUM_STEPS)] == whole_run[120:]
    assert [ordered(resumed.rows(step)) for step in (119, 5)] == [whole_run[119], whole_run[5]]


def test_a_thousand_segments_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixwright.data_mixing.timeline._MAX_KEPT", 64)
    run = genesis([100, 200, 300])
    ramp = policy(*(segment(step, [step + 1, 500, 1000 - step]) for step in range(1000)))
    reader = plan(run, (0, ramp))
    forwards = [reader.digest(step) for step in range(1000)]
    assert len(reader._timeline._known) <= 65
    assert len(reader._timeline._recent) <= 32
    assert [reader.digest(step) for step in (999, 500, 501, 3)] == [forwards[step] for step in (999, 500, 501, 3)]


def test_no_policy_in_force_is_a_clear_error() -> None:
    with pytest.raises(MixingError, match="no policy is in force at step 0: none is committed"):
        plan(genesis([5])).rows(0)
    with pytest.raises(MixingError, match="no policy is in force at step 2: the first takes effect at step 3"):
        plan(genesis([5]), (3, policy([1]))).rows(2)


@pytest.mark.parametrize("positions", [range(-1, 3), range(60, 65), range(64, 65)])
def test_positions_outside_the_batch_are_refused(positions: range) -> None:
    with pytest.raises(ValueError, match="outside range"):
        changing_plan().rows(0, positions)


def test_a_policy_that_does_not_fit_the_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="the segment at step 0 has 3 proportions, the run has 2 domains"):
        plan(genesis([5, 5]), (0, policy([1, 1, 1])))


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 4 is outside range\(4\)"):
        rank_positions(64, 4, 4)


def test_a_rank_of_no_rows_gets_none() -> None:
    assert ordered(changing_plan().rows(0, rank_positions(64, 0, 100))) == []
