from __future__ import annotations

import pytest
import torch

from rear_scale import rng
from rear_scale.rng import Purpose


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the Random123 distribution, philox4x32 with 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert rng.philox(counter, key) == expected
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(word.item() for word in rng.philox(tensors, key)) == expected


def test_a_draw_belongs_to_its_id_and_step_whatever_the_batch() -> None:
    ids, steps = torch.tensor([5, 900_000, 7]), torch.tensor([0, 3, 3])
    batch = rng.random_bits(1, Purpose.NOISE, ids, steps, 10)
    for row, (image, step) in enumerate(zip(ids, steps, strict=True)):
        alone = rng.random_bits(1, Purpose.NOISE, image[None], int(step), 10)[0]
        assert torch.equal(batch[row], alone)
    assert torch.equal(rng.random_bits(1, Purpose.NOISE, ids, steps, 6), batch[:, :6])


def test_seed_purpose_id_and_step_each_change_the_draw() -> None:
    base = (0, Purpose.NOISE, torch.tensor([1]), 2, 8)
    others = [
        (1, *base[1:]),
        (2**33, *base[1:]),
        (0, Purpose.SAMPLE_TOKEN, *base[2:]),
        (0, Purpose.NOISE, torch.tensor([2]), 2, 8),
        (0, Purpose.NOISE, torch.tensor([1]), 3, 8),
    ]
    for other in others:
        assert not (rng.random_bits(*other) == rng.random_bits(*base)).any()


def test_uniform_integers_and_exponential_have_their_distributions() -> None:
    bits = rng.random_bits(0, Purpose.SAMPLE_TOKEN, torch.arange(1000), 3, 1000)
    uniform = rng.as_uniform(bits)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 1e-3
    assert abs(uniform.var().item() - 1 / 12) < 1e-3
    counts = rng.as_integers(bits, 7).flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert ((counts - 1e6 / 7).abs() < 5 * (1e6 / 7) ** 0.5).all()
    exponential = rng.exponential(0, Purpose.SAMPLE_TOKEN, torch.arange(1000), 3, 1000)
    assert exponential.min() > 0
    assert exponential.isfinite().all()
    assert abs(exponential.mean().item() - 1) < 5e-3
    assert abs(exponential.var().item() - 1) < 2e-2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1437, 65_537])
def test_permuted_is_a_permutation_that_any_part_agrees_with(size: int) -> None:
    whole = rng.permuted(0, Purpose.DATA_ORDER, 4, torch.arange(size), size)
    assert torch.equal(whole.sort().values, torch.arange(size))
    some = torch.arange(0, size, 3).flip(0)
    assert torch.equal(rng.permuted(0, Purpose.DATA_ORDER, 4, some, size), whole[some])


def test_permutations_of_small_sets_are_equally_likely() -> None:
    counts: dict[tuple, int] = {}
    for occasion in range(1200):
        order = tuple(rng.permuted(0, Purpose.DATA_ORDER, occasion, torch.arange(4), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values())
    assert chi_square < 50  # 23 degrees of freedom: above that once in a thousand


def test_epochs_are_shuffled_independently() -> None:
    orders = torch.stack(
        [rng.permuted(0, Purpose.DATA_ORDER, epoch, torch.arange(10_000), 10_000) for epoch in range(3)]
    ).double()
    assert torch.corrcoef(orders).fill_diagonal_(0).abs().max() < 0.05


def test_draws_are_part_of_the_format() -> None:
    # A change here breaks the resume of every run and every published sample.
    assert rng.random_bits(7, Purpose.SAMPLE_TOKEN, torch.tensor([11]), 13, 2).tolist() == [[2175967184, 334416113]]
    assert rng.permuted(7, Purpose.DATA_ORDER, 2, torch.arange(5), 1000).tolist() == [191, 459, 462, 595, 50]
    assert rng.fold(7, Purpose.DEVICE_SEED, 1, 2, 3) == 5542376566976184114
