from __future__ import annotations

import pytest
import torch

from rear_scale.config import TokenizerConfig
from rear_scale.objective import permutation
from rear_scale.objective.permutation import SCANS, fixed_prefix, in_order, in_place, scan_order, training_orders

IDS = torch.arange(4000)
EPOCHS = torch.zeros(4000, dtype=torch.int64)


def layout(rows: int, columns: int, prefix: int = 0) -> TokenizerConfig:
    return TokenizerConfig(num_tokens=prefix + rows * columns, grid=[rows, columns], prefix_tokens=prefix)


@pytest.mark.parametrize("name", SCANS)
def test_every_scan_visits_every_place_once(name: str) -> None:
    grids = [(4, 4), (8, 8), (16, 16)] + [(3, 5), (8, 16), (16, 8), (1, 7), (7, 1)] * (name != "subsample")
    for rows, columns in grids:
        assert sorted(scan_order(name, layout(rows, columns)).tolist()) == list(range(rows * columns))
    # AliTok: the prefix stays in front.
    alitok = scan_order(name, layout(16, 16, 17))
    assert alitok[:17].tolist() == list(range(17))
    assert (alitok[17:] - 17).tolist() == scan_order(name, layout(16, 16)).tolist()


@pytest.mark.parametrize("name", ["alternate", "spiral_out", "z_curve"])
def test_scans_of_grids_that_are_not_square_by_hand(name: str) -> None:
    expected = {
        "alternate": [0, 1, 2, 3, 7, 6, 5, 4],
        "spiral_out": [5, 1, 2, 6, 4, 0, 3, 7],
        "z_curve": [0, 1, 4, 5, 2, 3, 6, 7],
    }
    assert scan_order(name, layout(2, 4)).tolist() == expected[name]


def test_a_sequence_has_its_own_order_alone() -> None:
    line = TokenizerConfig(num_tokens=128)
    assert scan_order("row_major", line).tolist() == list(range(128))
    assert permutation.fixed_order("row_major", line, torch.device("cpu")) is None
    assert fixed_prefix("fixed", line) == 0


def test_scans_by_hand() -> None:
    grids = {
        "row_major": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
        "alternate": [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]],
        "z_curve": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        "subsample": [[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]],
        "spiral_out": [[9, 10, 11, 12], [8, 1, 2, 13], [7, 0, 3, 14], [6, 5, 4, 15]],
        "spiral_in": [[6, 5, 4, 3], [7, 14, 13, 2], [8, 15, 12, 1], [9, 10, 11, 0]],
    }
    for name, grid in grids.items():
        visited = torch.tensor(grid).flatten()  # when each place is visited
        assert torch.equal(visited.argsort(), scan_order(name, layout(4, 4))), name


def test_permuted_rows_come_at_their_probability_and_are_uniform() -> None:
    orders = training_orders(IDS, EPOCHS, 0, 0.3, None, 6, 0)
    raster = torch.arange(6)
    permuted = orders[(orders != raster).any(1)]
    assert len(permuted) / len(IDS) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(orders.sort(1).values, raster.expand(4000, -1))
    orders = training_orders(IDS, EPOCHS, 0, 1.0, None, 6, 0)
    counts = torch.stack([(orders[:, step] == place).sum() for step in range(6) for place in range(6)])
    assert (counts / len(IDS) - 1 / 6).abs().max() < 0.03


def test_the_order_belongs_to_the_sample() -> None:
    whole = training_orders(IDS, EPOCHS, 3, 0.5, None, 16, 0)
    part = torch.tensor([17, 3999, 0])
    assert torch.equal(training_orders(IDS[part], EPOCHS[part], 3, 0.5, None, 16, 0), whole[part])
    assert not torch.equal(training_orders(IDS, EPOCHS + 1, 3, 0.5, None, 16, 0), whole)


def test_rows_that_are_not_permuted_keep_the_fixed_order() -> None:
    fixed = scan_order("z_curve", layout(4, 4))[None]
    assert training_orders(IDS, EPOCHS, 0, 0.0, fixed, 16, 0) is fixed
    assert training_orders(IDS, EPOCHS, 0, 0.0, None, 16, 0) is None
    orders = training_orders(IDS, EPOCHS, 0, 0.5, fixed, 16, 0)
    assert (orders == fixed).all(1).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_fixed_prefix_stays_in_front() -> None:
    assert fixed_prefix("fixed", layout(16, 16, 17)) == 17
    assert fixed_prefix("permuted", layout(16, 16, 17)) == fixed_prefix("fixed", layout(16, 16)) == 0
    orders = training_orders(IDS, EPOCHS, 0, 1.0, None, 20, 4)
    assert torch.equal(orders[:, :4], torch.arange(4).expand(4000, -1))
    assert (orders[:, 4:] != torch.arange(4, 20)).any()
    assert torch.equal(orders.sort(1).values, torch.arange(20).expand(4000, -1))


def test_in_place_undoes_in_order() -> None:
    tokens = torch.randint(100, (5, 16))
    for order in (
        None,
        scan_order("spiral_in", layout(4, 4))[None],
        permutation.sampling_orders(torch.arange(5), 0, 16, 0),
    ):
        assert torch.equal(in_place(in_order(tokens, order), order), tokens)
    order = permutation.sampling_orders(torch.arange(5), 0, 16, 0)
    assert in_order(tokens, order)[2, 3] == tokens[2, order[2, 3]]
