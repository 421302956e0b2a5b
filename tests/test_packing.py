"""Which pairs share a pack: budgets, order and fairness."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_adapters.engine.queue.packs import Job, PackQueue


def job(*lengths: int) -> Job[str]:
    return Job(["x" * length for length in lengths])


def queue_of(*jobs: Job[str]) -> PackQueue[str]:
    queue: PackQueue[str] = PackQueue()
    for each in jobs:
        queue.put(each)
    return queue


def packs(
    queue: PackQueue[str], budget: int, *, multiple: int = 1
) -> list[list[tuple[Job[str], int]]]:
    taken = []
    while pack := queue.take(budget, multiple=multiple):
        taken.append(pack)
        assert len(taken) < 10_000
    return taken


def lengths(pack) -> list[int]:
    return [len(each.pairs[position]) for each, position in pack]


def test_longest_pairs_go_first_and_packs_keep_to_the_budget():
    taken = packs(queue_of(job(3, 9, 1, 7, 5)), 12)
    assert [lengths(pack) for pack in taken] == [[9], [7, 5], [3, 1]]


def test_a_pair_longer_than_the_budget_goes_alone():
    assert [lengths(pack) for pack in packs(queue_of(job(50, 2, 60, 1)), 10)] == [
        [60],
        [50],
        [2, 1],
    ]


def test_a_full_pack_has_as_many_pairs_for_each_stream():
    queue: PackQueue[str] = PackQueue()
    queue.put(job(*[4] * 12))
    assert [len(pack) for pack in packs(queue, 21, multiple=2)] == [4, 4, 4]
    # The rest of a call, or all of it, goes as it is; so does what fits no multiple.
    for pairs, sizes in ((7, [4, 3]), (5, [5]), (3, [3]), (1, [1])):
        queue.put(job(*[4] * pairs))
        assert [len(pack) for pack in packs(queue, 21, multiple=2)] == sizes
    queue.put(job(15, 15, 15))
    assert [lengths(pack) for pack in packs(queue, 21, multiple=2)] == [[15], [15], [15]]


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 80),
)
def test_multiples_lose_no_pair(calls, multiple, budget):
    queue: PackQueue[str] = PackQueue()
    jobs = [job(*each) for each in calls]
    for each in jobs:
        queue.put(each)
    taken = packs(queue, budget, multiple=multiple)
    assert all(sum(lengths(pack)) <= budget or len(pack) == 1 for pack in taken)
    places = Counter((id(each), position) for pack in taken for each, position in pack)
    assert places == {
        (id(each), position): 1 for each in jobs for position in range(len(each.pairs))
    }
    assert len(queue) == 0
    assert [each.tokens_left for each in jobs] == [0] * len(jobs)


def test_an_empty_queue_gives_an_empty_pack():
    queue = PackQueue[str]()
    assert queue.take(10) == []
    assert len(queue) == 0


def test_the_queue_counts_the_pairs_that_wait():
    queue = queue_of(job(4, 4, 4), job(2))
    assert len(queue) == 4
    taken = len(queue.take(8))
    assert len(queue) == 4 - taken
    packs(queue, 8)
    assert len(queue) == 0


def test_a_small_call_overtakes_the_rest_of_a_large_one():
    large, small = job(*[10] * 1000), job(*[10] * 5)
    queue = queue_of(large)
    queue.take(100)
    queue.put(small)
    taken = queue.take(100)
    assert small.waiting == []
    assert len(taken) == 10, "and the large one has the rest of its pack"
    assert len(large.waiting) == 985


def test_a_call_of_ten_beside_a_bulk_takes_two_packs_more_than_its_own():
    """Whatever pack it arrives after, its pairs longer than what is left of a pack."""
    for before in range(20):
        large, small = job(*[100] * 10_000), job(*[500] * 10)
        queue = queue_of(large)
        for _ in range(before):
            queue.take(2048)
        queue.put(small)
        taken = 0
        while small.waiting:
            queue.take(2048)
            taken += 1
        # Alone it would take three; the pack that was under way when it came is the other one.
        assert taken <= 3 + 1


def test_calls_of_one_size_are_served_as_they_came():
    calls = [job(10, 10) for _ in range(5)]
    order = [each for pack in packs(queue_of(*calls), 20) for each, _ in pack]
    assert list(dict.fromkeys(order)) == calls


def test_a_stream_of_small_calls_does_not_starve_a_large_one():
    large = job(*[10] * 100)
    queue = queue_of(large)
    # More arrives than can be served.
    for _ in range(25 * 8):
        queue.put(job(10, 10, 10, 10))
        queue.put(job(10, 10, 10, 10))
        queue.take(40)
    assert large.waiting == []


def test_pairs_of_a_pack_come_longest_first_whatever_call_they_are_of():
    (pack,) = packs(queue_of(job(3, 9), job(5, 7), job(9)), 100)
    assert lengths(pack) == [9, 9, 7, 5, 3]


def test_dropping_forgets_what_waits_and_is_harmless_twice():
    one, other = job(5, 5, 5), job(4, 4)
    queue = queue_of(one, other)
    queue.drop(one)
    queue.drop(one)
    assert (one.waiting, len(queue)) == ([], 2)
    assert [lengths(pack) for pack in packs(queue, 100)] == [[4, 4]]
    queue.drop(other)
    assert len(queue) == 0


def test_clearing_forgets_every_job():
    one, other = job(5), job(4, 4)
    queue = queue_of(one, other)
    queue.clear()
    assert (len(queue), queue.take(10)) == (0, [])
    queue.drop(one)
    queue.put(job(3))
    assert [lengths(pack) for pack in packs(queue, 10)] == [[3]]


some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(st.lists(some_lengths, min_size=1, max_size=6), st.integers(1, 100), st.integers(0, 5))
def test_every_pair_is_taken_once_within_the_budget(calls, budget, before):
    jobs = [job(*each) for each in calls]
    queue = queue_of(*jobs[:before])
    first = queue.take(budget)
    for each in jobs[before:]:
        queue.put(each)
    taken = [pack for pack in [first, *packs(queue, budget)] if pack]
    assert all(sum(lengths(pack)) <= budget or len(pack) == 1 for pack in taken)
    number = {id(each): index for index, each in enumerate(jobs)}
    seen = Counter((number[id(each)], position) for pack in taken for each, position in pack)
    assert seen == Counter(
        (n, position) for n, each in enumerate(calls) for position in range(len(each))
    )
    for each in jobs:
        order = [len(each.pairs[p]) for pack in taken for owner, p in pack if owner is each]
        assert all(a >= b for a, b in pairwise(order)), "longest first within a call"
        assert each.tokens_left == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_job_knows_what_is_missing(count):
    made = job(*range(1, count + 1))
    assert (made.logits, made.missing) == ([None] * count, count)
