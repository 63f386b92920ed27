from __future__ import annotations

import pytest
import torch

from rear_scale import rng
from rear_scale.shards.order import BatchOrder, GroupedOrder, StreamOrder, group_by_class

SHARDS = (300, 17, 0, 450, 233)  # 1,000 samples
ORDERS = {
    "mmap": lambda batch, seed=3: BatchOrder(1000, batch, seed),
    "stream": lambda batch, seed=3: StreamOrder(1000, batch, seed, shard_samples=SHARDS, streams=6, buffer_samples=32),
    "many streams": lambda batch, seed=3: StreamOrder(
        1000, batch, seed, shard_samples=SHARDS, streams=512, buffer_samples=8
    ),
}


@pytest.mark.parametrize("mode", ORDERS)
def test_two_epochs_are_the_same_sequence_for_any_ranks_and_resume_anywhere(mode: str) -> None:
    batch = 24
    order = ORDERS[mode](batch)
    steps = range(1, 2 * 1000 // batch + 2)
    whole = torch.cat([order.global_batch(step)[0] for step in steps])
    epochs = torch.cat([order.global_batch(step)[1] for step in steps])
    for epoch in (0, 1):
        assert sorted(whole[epoch * 1000 : (epoch + 1) * 1000].tolist()) == list(range(1000)), "not every sample once"
        assert (epochs[epoch * 1000 : (epoch + 1) * 1000] == epoch).all()
    assert whole[:1000].tolist() != whole[1000:2000].tolist()
    for world_size in (1, 2, 3, 8):
        for micro_steps in (1, 3):
            ranks = [ORDERS[mode](batch) for _ in range(world_size)]
            found = [
                part
                for step in steps
                for rank, own in enumerate(ranks)
                for part, _ in own.rank_batches(step, rank, world_size, micro_steps)
            ]
            assert torch.equal(torch.cat(found), whole), (world_size, micro_steps)
    # A new reader that starts at a step knows nothing of those before.
    for start in torch.randint(1, len(steps), (10,), generator=torch.Generator().manual_seed(0)).tolist():
        again = ORDERS[mode](batch)
        found = torch.cat([again.global_batch(step)[0] for step in range(start, len(steps) + 1)])
        assert torch.equal(found, whole[(start - 1) * batch :]), start


@pytest.mark.parametrize("mode", ORDERS)
@pytest.mark.parametrize("batch", [1, 7, 1000, 2300])
def test_every_sample_comes_once_per_epoch_whatever_the_batch(mode: str, batch: int) -> None:
    order = ORDERS[mode](batch)
    ids = torch.cat([order.global_batch(step)[0] for step in range(1, -(-3000 // batch) + 1)])
    for epoch in range(3):
        assert sorted(ids[epoch * 1000 : (epoch + 1) * 1000].tolist()) == list(range(1000))


@pytest.mark.parametrize("mode", ORDERS)
def test_another_seed_is_another_order(mode: str) -> None:
    first, other = (ORDERS[mode](24, seed).global_batch(1)[0] for seed in (0, 1))
    assert not torch.equal(first, other)


def test_a_rank_reads_only_its_lanes() -> None:
    samples, shards = 64_000, 64
    order = StreamOrder(samples, 64, 0, shard_samples=(samples // shards,) * shards, streams=64, buffer_samples=100)
    for rank in range(8):
        ids = torch.cat([order.rank_batches(step, rank, 8, 1)[0][0] for step in range(1, 1001)])
        # An eighth of the streams passes through an eighth of the shards, and at its ends into one more at most.
        assert len(torch.unique(ids // (samples // shards))) <= shards // 8 + 1


def test_a_stream_is_shuffled_as_widely_as_its_lanes() -> None:
    """What data/README.md promises: a batch draws from all streams, neighbours are apart, epochs differ."""
    samples, batch, streams, buffer = 64_000, 64, 64, 500
    order = StreamOrder(samples, batch, 0, shard_samples=(1000,) * 64, streams=streams, buffer_samples=buffer)
    epochs = [torch.cat([order.global_batch(step + 1000 * epoch)[0] for step in range(1, 1001)]) for epoch in (0, 1)]
    for ids in epochs:
        spread = [len(torch.unique(ids[n * batch : (n + 1) * batch] // 1000)) for n in range(0, 1000, 50)]
        assert min(spread) > 0.9 * streams, "a batch comes from few shards"
        # In its own stream, a sample's successor is some other of the buffer, not its neighbour.
        stream = ids.view(1000, batch)[:, 5]
        assert ((stream[1:] - stream[:-1]) == 1).float().mean() < 0.02
    # The shards around a sample, in its stream, are other ones in the next epoch.
    places = [ids.argsort() % batch for ids in epochs]
    assert (places[0] == places[1]).float().mean() < 0.05


def test_groups_have_permutations_of_their_own() -> None:
    groups = torch.arange(40).repeat_interleave(torch.arange(1, 41))
    sizes = groups + 1
    positions = torch.cat([torch.arange(size) for size in range(1, 41)])
    found = rng.permuted_within(1, rng.Purpose.STREAM_ORDER, 2, groups, positions, sizes)
    assert all(sorted(found[groups == group].tolist()) == list(range(group + 1)) for group in range(40))
    assert (found == positions).float().mean() < 0.2
    other = rng.permuted_within(1, rng.Purpose.STREAM_ORDER, 3, groups, positions, sizes)
    assert not torch.equal(found, other)
    chosen = torch.tensor([700, 3, 55])
    alone = rng.permuted_within(1, rng.Purpose.STREAM_ORDER, 2, groups[chosen], positions[chosen], sizes[chosen])
    assert torch.equal(alone, found[chosen])


def _classes(ids: torch.Tensor, epochs: torch.Tensor) -> torch.Tensor:
    """40 classes, and a tenth of the samples without one (40), other ones in each epoch."""
    return torch.where((ids * 7 + epochs * 3) % 10 == 0, 40, ids * 13 % 40)


@pytest.mark.parametrize("mode", ORDERS)
def test_grouped_batches_hold_the_same_samples_and_are_the_same_for_any_ranks(mode: str) -> None:
    batch, steps = (
        48,
        range(1, 2 * 1000 // 48 + 2),
    )  # two epochs; one batch holds the end of one and the start of the next
    plain = ORDERS[mode](batch)
    grouped = GroupedOrder(ORDERS[mode](batch), _classes, 40)
    batches = {step: grouped.global_batch(step) for step in steps}
    for step, (ids, epochs) in batches.items():
        expected, expected_epochs = plain.global_batch(step)
        pairs = lambda ids, epochs: sorted(zip(ids.tolist(), epochs.tolist(), strict=True))  # noqa: E731
        assert pairs(ids, epochs) == pairs(expected, expected_epochs), step
        classes = _classes(ids, epochs)
        others = classes[classes != 40]
        assert torch.equal(others, others.sort().values), "not in the order of classes"
    assert any(len(epochs.unique()) == 2 for _, epochs in batches.values())
    for world_size, micro_steps in ((1, 1), (1, 6), (2, 3), (3, 2), (8, 1)):
        orders = [GroupedOrder(ORDERS[mode](batch), _classes, 40) for _ in range(world_size)]
        for step in (1, 7, 21, 41):  # a new reader may start anywhere
            parts = [
                part
                for rank, order in enumerate(orders)
                for part in order.rank_batches(step, rank, world_size, micro_steps)
            ]
            for kind in (0, 1):
                assert torch.equal(torch.cat([part[kind] for part in parts]), batches[step][kind])


@pytest.mark.parametrize(("size", "nulls"), [(1, 0), (1, 1), (2, 1), (16, 16), (64, 5), (2048, 205), (2048, 0)])
def test_images_without_a_class_are_spread_evenly(size: int, nulls: int) -> None:
    draws = torch.Generator().manual_seed(size + nulls)
    classes = torch.randint(1000, (size,), generator=draws)
    classes[torch.randperm(size, generator=draws)[:nulls]] = 1000
    places = group_by_class(classes, 1000)
    assert sorted(places.tolist()) == list(range(size))
    for parts in (1, 2, 8, 64):
        if size % parts == 0:
            counts = torch.stack([(part == 1000).sum() for part in classes[places].chunk(parts)])
            assert counts.max() - counts.min() <= 1, (parts, counts)


def test_a_grouped_batch_of_2048_leaves_two_fifths_of_the_classes() -> None:
    """0.41 distinct classes per image on 8 ranks, against 0.81 in the order as drawn."""
    draws = torch.Generator().manual_seed(0)
    shares: dict[str, list[float]] = {"drawn": [], "grouped": []}
    for _ in range(20):
        classes = torch.randint(1000, (2048,), generator=draws)
        classes[torch.rand(2048, generator=draws) < 0.1] = 1000
        for name, batch in (("drawn", classes), ("grouped", classes[group_by_class(classes, 1000)])):
            shares[name].append(sum(len(part.unique()) for part in batch.chunk(8)) / 2048)
    means = {name: sum(values) / 20 for name, values in shares.items()}
    assert means["grouped"] == pytest.approx(0.415, abs=0.01)
    assert means["drawn"] == pytest.approx(0.81, abs=0.01)
