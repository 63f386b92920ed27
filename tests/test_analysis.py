from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import run_alone, run_ranks
from torch import nn

from rear_scale.analysis.token_prediction import TokenPrediction, predict_tokens
from rear_scale.shards.reader import open_tokens
from rear_scale.world import World


class Repeats(nn.Module):
    """Says that a token is the one before it (the first: 0), with odds of e^2 to 1 against each other code."""

    def forward(self, tokens: torch.Tensor, classes: torch.Tensor, rows: None, order=None) -> dict[str, torch.Tensor]:
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        return {"logits": 2 * nn.functional.one_hot(before, 32).float()}


def _predict(world: World, tokens: Path, cache: Path, draws: int, batch_size: int) -> TokenPrediction:
    return predict_tokens(
        Repeats(), open_tokens(tokens, str(cache)), world, replace_rate=0.25, draws=draws, batch_size=batch_size
    )


def test_ratio_and_perplexity_are_those_of_the_papers(tmp_path: Path, tokens: Path) -> None:
    found = run_alone(_predict, tokens, tmp_path, 0, 7)
    sequences = torch.from_numpy(open_tokens(tokens, str(tmp_path)).tokens.astype("int64"))
    before = torch.cat([torch.zeros_like(sequences[:, :1]), sequences[:, :-1]], dim=1)
    right = (before == sequences).double().mean().item()
    log_total = math.log(math.e**2 + 31)
    assert found.ctr == pytest.approx(right)
    assert found.perplexity == pytest.approx(math.exp(log_total - 2 * right), rel=1e-6)
    assert (found.sequences, found.draws) == (100, 0)


def test_noise_lowers_the_ratio_by_its_rate(tmp_path: Path, tokens: Path) -> None:
    clean, noisy = (run_alone(_predict, tokens, tmp_path, draws, 50) for draws in (0, 16))
    # A replaced token is right by accident once in 32 times; the first position has no context.
    kept = 0.75 + 0.25 / 32
    assert noisy.ctr == pytest.approx(clean.ctr * kept + 0.25 * (1 - clean.ctr) / 32, abs=0.01)
    assert noisy.perplexity > clean.perplexity
    assert run_alone(_predict, tokens, tmp_path, 16, 50) == noisy


def test_ranks_and_batches_do_not_matter(tmp_path: Path, tokens: Path) -> None:
    # This model's scores of a sequence do not depend on the others of its batch, so all numbers have the same bits.
    expected = run_alone(_predict, tokens, tmp_path, 2, 50)
    for found in run_ranks(3, _predict, tokens, tmp_path, 2, 9):
        assert found == expected
