"""A model of billions of weights on ranks of which one is here and none has memory."""

from __future__ import annotations

import pytest

from rear_scale import config
from rear_scale.config import InputError
from rear_scale.scaling.simulate import beside_formula, simulate

RANKS = 512
SEVEN_BILLION = ["strategy=fsdp2", "train.micro_batch_size=4"]


def check(found: dict) -> None:
    for part, size in found["memory_gib"].items():
        assert size == pytest.approx(found["formula_memory_gib"][part], rel=0.05), part
    for kind, sent in found["collectives"].items():
        assert sent["calls"] == sent["formula_calls"], kind
        assert sent["gib"] == pytest.approx(sent["formula_gib"], rel=0.01), kind


@pytest.mark.parametrize(
    ("depth", "policy"),
    [
        # Fewer blocks hold less at once than the formula says: 16% at 4, 5% at 6.
        pytest.param(8, "none", marks=pytest.mark.long),
        pytest.param(10, "full", marks=pytest.mark.long),
        pytest.param(40, "none", marks=pytest.mark.long),
        pytest.param(40, "full", marks=pytest.mark.long),
    ],
)
def test_seven_billion_parameters_step_on_512_ranks_as_the_formulas_say(depth: int, policy: str) -> None:
    """The whole depth takes minutes; each block is like the others."""
    overrides = [*SEVEN_BILLION, f"train.activation_checkpointing={policy}", f"model.depth={depth}"]
    found = beside_formula(config.load("rear_7b.yaml", overrides), RANKS)
    print(found)
    assert found["world_size"] == RANKS
    assert found["micro_steps"] == 1
    check(found)


@pytest.mark.parametrize(
    "policy", ["selective", *(pytest.param(one, marks=pytest.mark.long) for one in ("full", "every_n"))]
)
def test_what_comes_while_something_else_goes_is_counted_once(policy: str) -> None:
    """Shards of gradients as large as the activations, and blocks computed again when the logits are gone."""
    overrides = ["strategy=hsdp", "strategy.replicas=64", f"train.activation_checkpointing={policy}", "model.depth=6",
                 "objective.heads.encode_tap=1", "objective.heads.decode_tap=6", "train.micro_batch_size=4"]  # fmt: skip
    check(beside_formula(config.load("rear_7b.yaml", overrides), RANKS))


def test_replicas_and_micro_steps_send_as_the_formula_says() -> None:
    overrides = ["strategy=hsdp", "strategy.replicas=8", "model.depth=4", "objective.heads.decode_tap=3"]
    found = beside_formula(config.load("rear_b.yaml", [*overrides, "train.micro_batch_size=4"]), 64)
    assert found["micro_steps"] == 2
    assert found["collectives"].keys() == {"all_gather", "reduce_scatter", "all_reduce"}
    for kind, sent in found["collectives"].items():
        assert sent["calls"] == sent["formula_calls"], kind
        assert sent["gib"] == pytest.approx(sent["formula_gib"], rel=0.01), kind


def test_an_engine_that_needs_memory_is_refused() -> None:
    with pytest.raises(InputError, match=r"strategy=zero2 cannot be simulated.*strategy=fsdp2"):
        simulate(config.load("rear_b.yaml", ["strategy=zero2"]), 8)
