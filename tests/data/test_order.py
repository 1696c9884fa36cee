"""The order of clips: every example once an epoch, from any step, however many there are."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from vatt_fast.data.order import Order, Shuffle

HUNDRED_MILLION = 10**8


def folder(count):
    return np.arange(count + 1)


def shards(*sizes):
    return np.cumsum([0, *sizes])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_a_shuffle_is_a_permutation_and_has_an_inverse(count):
    shuffle, everything = Shuffle(count, 3, count), np.arange(count)
    assert sorted(shuffle(everything)) == everything.tolist()
    assert np.array_equal(shuffle.inverse(shuffle(everything)), everything)


def test_all_permutations_are_equally_likely():
    """24 of 4 elements, 40 times each: chi squared of 23 degrees of freedom."""
    seen = Counter(tuple(Shuffle(4, key)(np.arange(4)).tolist()) for key in range(960))
    assert len(seen) == 24
    assert sum((count - 40) ** 2 / 40 for count in seen.values()) < 49.7  # p = 0.001


def test_pairs_of_a_large_shuffle_are_independent():
    """Neighbours land anywhere, and any place's element is anywhere."""
    count, pairs = 10**6, np.arange(0, 40_000)
    found = np.concatenate([Shuffle(count, key)(pairs) for key in range(3)]) / count
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
    counts = np.histogram(found, 100, (0, 1))[0]
    assert ((counts - 1200) ** 2 / 1200).sum() < 149  # 99 degrees of freedom, p = 0.001


@pytest.mark.parametrize("blocks", [folder(101), shards(7, 1, 30, 2, 60, 1), shards(*[9] * 70)])
@pytest.mark.parametrize("rows", [5, 16])
def test_every_example_once_an_epoch(blocks, rows):
    order, count = Order([blocks], [1.0], rows, 1), int(blocks[-1])
    steps = order.steps_per_epoch
    assert steps == count // rows
    epochs = [
        np.concatenate([order(epoch * steps + step) for step in range(steps)]) for epoch in range(2)
    ]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == steps * rows and 0 <= epoch.min() <= epoch.max() < count
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_hundred_million_examples_from_any_step():
    order = Order([np.array([0, HUNDRED_MILLION])], [1.0], 2048, 0)
    steps = order.steps_per_epoch
    assert steps == HUNDRED_MILLION // 2048
    drawn = np.random.default_rng(0).choice(steps, 12, replace=False).tolist()
    seen = np.concatenate([order(step) for step in (0, steps - 1, *drawn)])
    assert len(np.unique(seen)) == len(seen) - 2048 * (len(drawn) + 2 - len({0, steps - 1, *drawn}))
    assert seen.min() < 1e5 and seen.max() > HUNDRED_MILLION - 1e5  # from all over
    again = Order([np.array([0, HUNDRED_MILLION])], [1.0], 2048, 0)
    far = 10**9
    assert np.array_equal(order(far), again(far))
    assert not np.array_equal(order(5), order(5 + steps))


def test_few_shards_are_open_at_a_time_and_their_examples_mix():
    sizes = np.random.default_rng(0).integers(500, 1500, 400)
    blocks = shards(*sizes)
    order = Order([blocks], [1.0], 64, 0)
    shard = [np.searchsorted(blocks, order(step), side="right") - 1 for step in range(300)]
    each = [len(set(one.tolist())) for one in shard]
    assert max(each) <= 16 and np.median(each) == 8  # 16 where one group follows another
    first = np.concatenate([order(step) for step in range(40)])
    assert np.corrcoef(first[:-1], first[1:])[0, 1] < 0.5  # no runs of one shard
    files = set(np.concatenate(shard[:50]).tolist())
    assert files.isdisjoint(np.concatenate(shard[250:]).tolist())  # read once, then done with


def test_segments_of_long_files_do_not_fill_a_batch():
    """Blocks of 10 segments: at least 8 batches' examples lie in a group."""
    blocks = shards(*[10] * 3000)
    order = Order([blocks], [1.0], 256, 0)
    for step in range(20):
        files = Counter((order(step) // 10).tolist())
        assert max(files.values()) <= 6 and len(files) > 128


def test_a_batch_larger_than_the_source_repeats_evenly():
    order = Order([folder(11)], [1.0], 24, 0)
    rows = np.concatenate([order(step) for step in range(11)])
    assert set(Counter(rows.tolist()).values()) == {24}
    assert order.steps_per_epoch == 1


# -- several sources -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.17, 0.33), (0.98, 0.01, 0.01), (0.9, 0.05, 0.05)])
@pytest.mark.parametrize("rows", [3, 16])
def test_each_source_gives_its_share_and_runs_through_its_own_epochs(weights, rows):
    blocks = [folder(101), shards(20, 17), shards(*[40] * 30)]
    order, steps = Order(blocks, weights, rows, 7), 120
    given: list[list[int]] = [[], [], []]
    for step in range(steps):
        examples = order(step)
        sources = np.searchsorted(order.starts, examples, side="right") - 1
        assert [order.source_of(step, row) for row in range(rows)] == sources.tolist()
        assert len(set(examples.tolist())) == rows
        for source in range(3):
            given[source] += examples[sources == source].tolist()
            share = weights[source] * rows * (step + 1)
            assert abs(len(given[source]) - share) < 3  # never far from its share


def test_epochs_of_a_source_hold_nothing_twice():
    order = Order([folder(50), folder(37)], [0.6, 0.4], 7, 0)
    for source in range(2):
        steps = order.epoch_steps[source]
        for epoch in range(8):
            seen = np.concatenate([order(epoch * steps + step) for step in range(steps)])
            first, past = order.starts[source : source + 2]
            own = seen[(first <= seen) & (seen < past)]
            assert len(own) == len(np.unique(own)) >= order.counts[source] - 7


def test_a_share_too_small_is_refused():
    with pytest.raises(ValueError, match=r"source 2 has a share of 1e-06 .* raise its weight"):
        Order([folder(5), folder(5)], [1 - 1e-6, 1e-6], 4, 0)


def test_it_travels_to_a_process_and_little_of_it():
    order = Order([folder(10**6), shards(*[100] * 50)], [0.7, 0.3], 9, 3)
    order(5)
    sent = pickle.dumps(order)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent)(77), order(77))


# -- stand-ins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 7])
def test_stand_ins_are_nobody_elses(rows):
    order = Order([folder(40), shards(30, 33)], [0.5, 0.5], rows, 0)
    for step in range(15):
        held = set(order(step).tolist())
        for row in range(rows):
            source = order.source_of(step, row)
            own = list(order.stand_ins(step, row))
            assert own and held.isdisjoint(own)
            held |= set(own)
            assert all(order.starts[source] <= one < order.starts[source + 1] for one in own)
        for source in range(2):
            others = set(order.others(step, source))
            assert others <= held and others.isdisjoint(order(step).tolist())


def test_stand_ins_of_a_hundred_million_are_found_at_once():
    order = Order([np.array([0, HUNDRED_MILLION])], [1.0], 512, 0)
    found = [
        one for row in (0, 511) for one in itertools.islice(order.stand_ins(9_999_999, row), 5)
    ]
    assert len(set(found)) == 10 and set(found).isdisjoint(order(9_999_999).tolist())


def test_where_a_batch_takes_everything_anyone_stands_in():
    order = Order([folder(5)], [1.0], 8, 0)
    for row in range(8):
        planned = int(order(3)[row])
        assert sorted([planned, *order.stand_ins(3, row)]) == list(range(5))
