from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import CODEBOOK_SIZE, NUM_CLASSES, tiny_config
from torch.nn import functional as F

from rear_scale import config, rng
from rear_scale.config import NoiseConfig
from rear_scale.objective import Objective, Task, losses, noise, schedules
from rear_scale.optim import schedule

CPU = torch.device("cpu")


def test_learning_rate_has_the_papers_shape() -> None:
    rate = {"peak": 4e-4, "end": 1e-5, "warmup_steps": 62_500, "total_steps": 250_000}
    assert schedule.learning_rate(1, **rate) == pytest.approx(6.4e-9)
    assert schedule.learning_rate(31_250, **rate) == pytest.approx(2e-4)
    assert schedule.learning_rate(62_500, **rate) == pytest.approx(4e-4)
    assert schedule.learning_rate(156_250, **rate) == pytest.approx((4e-4 + 1e-5) / 2)
    assert schedule.learning_rate(250_000, **rate) == pytest.approx(1e-5)
    assert schedule.learning_rate(260_000, **rate) == pytest.approx(1e-5)
    assert schedule.learning_rate(1, **{**rate, "warmup_steps": 0, "total_steps": 1}) == pytest.approx(1e-5)
    assert schedule.learning_rate(30, **{**rate, "total_steps": 30}) == pytest.approx(4e-4 * 30 / 62_500)


def test_a_wsd_rate_is_constant_between_warm_up_and_decay() -> None:
    rate = {"peak": 1e-3, "end": 1e-5, "warmup_steps": 10, "form": "wsd"}
    rates = [schedule.learning_rate(step, **rate, total_steps=100, decay_steps=20) for step in range(1, 102)]
    assert rates[:10] == pytest.approx([step * 1e-4 for step in range(1, 11)])
    assert set(rates[9:80]) == {1e-3}
    assert rates[80:100] == pytest.approx([1e-3 - 0.99e-3 * step / 20 for step in range(1, 21)])
    assert rates[99] == rates[100] == pytest.approx(1e-5)
    by_root = [
        schedule.learning_rate(step, **rate, total_steps=100, decay_steps=20, decay_form="one_minus_sqrt")
        for step in (80, 81, 85, 100)
    ]
    assert by_root == pytest.approx([1e-3, 1e-5 + 0.99e-3 * (1 - math.sqrt(0.05)), 1e-5 + 0.99e-3 / 2, 1e-5])
    # Without a decay; and what comes before the decay does not depend on the length of the run.
    assert schedule.learning_rate(100, **rate, total_steps=100) == 1e-3
    longer = [schedule.learning_rate(step, **rate, total_steps=400, decay_steps=80) for step in range(1, 81)]
    assert longer == rates[:80]


def test_noise_bound_is_the_papers_example() -> None:
    # Appendix A: at epoch 150 of 400 rates are drawn from (0, 1/2). Step s comes after s - 1 updates.
    def bound(step: int) -> float:
        return schedules.linear_decay(step, 1.0, 0, 187_500)

    assert bound(1) == 1.0
    assert bound(93_751) == pytest.approx(0.5)
    assert bound(187_500) == pytest.approx(1 / 187_500)
    assert bound(187_501) == 0
    assert bound(250_000) == 0
    assert schedules.linear_decay(10, 0.5, 20, 40) == 0.5
    assert schedules.linear_decay(31, 0.5, 20, 40) == pytest.approx(0.25)
    assert schedules.linear_decay(5, 1.0, 10, 10) == 1.0
    assert schedules.linear_decay(11, 1.0, 10, 10) == 0.0


def test_replacement_follows_its_rate_over_the_whole_codebook() -> None:
    tokens = torch.zeros(500, 200, dtype=torch.int64)
    ids = torch.arange(500)
    changed = noise.replace_at_rate(tokens, 0.3, ids, 0, 1, 32)
    assert (changed != 0).float().mean().item() == pytest.approx(0.3 * 31 / 32, abs=0.005)
    counts = changed[changed != 0].bincount(minlength=32)[1:].float()
    assert (counts / counts.mean() - 1).abs().max() < 0.15
    assert torch.equal(noise.replace_at_rate(tokens, 0.0, ids, 0, 1, 32), tokens)
    assert torch.equal(noise.replace_at_rate(tokens, 0.3, ids, 0, 1, 32), changed)
    assert not torch.equal(noise.replace_at_rate(tokens, 0.3, ids, 1, 1, 32), changed)


def test_each_sequence_has_its_own_rate_below_the_bound() -> None:
    tokens = torch.full((2000, 400), 7)
    ids, epochs = torch.arange(2000), torch.full((2000,), 3)
    rates = (noise.replace_tokens(tokens, ids, epochs, 0, 0.5, 1000, NoiseConfig())[0] != 7).float().mean(1)
    assert rates.mean().item() == pytest.approx(0.25, abs=0.01)
    assert rates.max() < 0.6
    assert rates.min() < 0.02
    assert rates.std().item() == pytest.approx(0.5 / 12**0.5, abs=0.01)


def test_noise_belongs_to_the_sample_whatever_the_batch() -> None:
    tokens = torch.randint(32, (6, 16), generator=torch.Generator().manual_seed(0))
    ids, epochs = torch.tensor([4, 99, 12, 7, 0, 3]), torch.tensor([0, 0, 1, 1, 2, 2])
    whole, _ = noise.replace_tokens(tokens, ids, epochs, 0, 1.0, 32, NoiseConfig())
    for part in ([0], [5, 2], [1, 3, 4]):
        assert torch.equal(
            noise.replace_tokens(tokens[part], ids[part], epochs[part], 0, 1.0, 32, NoiseConfig())[0], whole[part]
        )


def test_next_token_loss_is_cross_entropy_and_accuracy() -> None:
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    loss, accuracy = losses.next_token(logits, tokens)
    expected = -logits.log_softmax(2).gather(2, tokens[..., None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert accuracy.item() == pytest.approx((logits.argmax(2) == tokens).float().mean().item())


def test_embedding_distance_is_eq_6_per_token() -> None:
    features, codes = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    distance = losses.embedding_distance(features, F.normalize(codes, dim=2), num_tokens=15)
    expected = (1 - F.cosine_similarity(features, codes, dim=2)).sum() / 15
    assert distance.item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.embedding_distance(3 * codes, F.normalize(codes, dim=2), 15).item() == pytest.approx(0, abs=1e-6)
    assert losses.embedding_distance(-codes, F.normalize(codes, dim=2), 12).item() == pytest.approx(2, rel=1e-6)


def objective(tmp_path: Path, tokens: Path, *overrides: str) -> Objective:
    cfg = tiny_config(tmp_path, tokens, *overrides)
    codebook = torch.randn(CODEBOOK_SIZE, 8, generator=torch.Generator().manual_seed(0))
    return Objective(cfg, config.derive(cfg, 1, 100), codebook, CPU)


def test_the_loss_is_eq_7_with_clean_targets(tmp_path: Path, tokens: Path) -> None:
    target = objective(tmp_path, tokens, "objective.heads.weight=0.5")
    clean = torch.randint(CODEBOOK_SIZE, (4, 16))
    output = {
        "logits": torch.randn(4, 16, CODEBOOK_SIZE),
        "encode": torch.randn(4, 15, 8),
        "decode": torch.randn(4, 15, 8),
    }
    loss, statistics = target.loss(output, Task(clean, clean, None, None))
    codes = target.directions[clean]
    encode = (1 - F.cosine_similarity(output["encode"], codes[:, :-1], dim=2)).sum() / 64
    decode = (1 - F.cosine_similarity(output["decode"], codes[:, 1:], dim=2)).sum() / 64
    cross_entropy = F.cross_entropy(output["logits"].flatten(0, 1), clean.flatten())
    named = dict(zip(target.names, statistics.tolist(), strict=True))
    assert loss.item() == pytest.approx((cross_entropy + 0.5 * (encode + decode)).item(), rel=1e-6)
    assert named["loss"] == loss.item()
    assert named["loss_ar"] == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert named["loss_encode"] == pytest.approx(encode.item(), rel=1e-6)
    assert named["loss_decode"] == pytest.approx(decode.item(), rel=1e-6)
    # Without heads, their terms are not zero but absent.
    loss, statistics = target.loss({"logits": output["logits"]}, Task(clean, clean, None, None))
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    named = dict(zip(target.names, statistics.tolist(), strict=True))
    assert math.isnan(named["loss_encode"])
    assert math.isnan(named["loss_decode"])


def test_labels_are_dropped_at_their_rate_by_sample(tmp_path: Path, tokens: Path) -> None:
    target = objective(tmp_path, tokens)
    ids, epochs = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    labels, clean = ids % NUM_CLASSES, torch.zeros(20_000, 16, dtype=torch.int64)
    batch = target.micro_batch(clean, labels, ids, epochs)
    classes = batch.classes[batch.class_index]
    dropped = classes == NUM_CLASSES
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(classes[~dropped], labels[~dropped])
    part = target.micro_batch(clean[5:9], labels[5:9], ids[5:9], epochs[5:9])
    assert torch.equal(part.classes if part.class_index is None else part.classes[part.class_index], classes[5:9])
    other = objective(tmp_path, tokens, "model.modulation=per_sample").micro_batch(clean, labels, ids, epochs)
    assert other.class_index is None
    assert torch.equal(other.classes, classes)


def test_context_is_noisy_until_the_schedule_ends(tmp_path: Path, tokens: Path) -> None:
    target = objective(tmp_path, tokens)
    ids = torch.arange(8)
    batch = target.micro_batch(torch.zeros(8, 16, dtype=torch.int64), ids % 5, ids, torch.zeros_like(ids))
    assert target.task(batch, 1).context.any()
    assert target.noise_max(9) > 0
    assert target.noise_max(10) == 0
    assert torch.equal(target.task(batch, 10).context, batch.tokens)


def test_purposes_do_not_share_draws() -> None:
    assert len({int(purpose) for purpose in rng.Purpose}) == len(rng.Purpose)


def switched(tmp_path: Path, tokens: Path, *overrides: str) -> tuple[Objective, Task]:
    """An objective and what it asks at step 1: the same samples and seed whatever the overrides."""
    target = objective(tmp_path, tokens, *overrides)
    ids = torch.arange(64)
    clean = torch.randint(CODEBOOK_SIZE, (64, 16), generator=torch.Generator().manual_seed(4))
    return target, target.task(target.micro_batch(clean, ids % 5, ids, torch.zeros_like(ids)), 1)


def test_fixed_rates_replace_that_share_of_every_sequence(tmp_path: Path, tokens: Path) -> None:
    fixed = ["objective.noise.max=0.25", "objective.noise.rate=fixed", "objective.noise.schedule=constant"]
    target, task = switched(tmp_path, tokens, *fixed)
    assert task.replaced.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert target.noise_max(1) == target.noise_max(12) == 0.25
    uniform, other = switched(tmp_path, tokens, *fixed[::2])
    # Rates below the limit: what a lower rate replaces, the limit replaces too, by the same code.
    assert (task.replaced | ~other.replaced).all()
    assert torch.equal(other.context[other.replaced], task.context[other.replaced])
    assert torch.equal(task.tokens, other.tokens)
    assert uniform.noise_max(12) == 0.25


def test_masked_noise_uses_the_mask_token_at_the_same_places(tmp_path: Path, tokens: Path) -> None:
    _, task = switched(tmp_path, tokens)
    _, masked = switched(tmp_path, tokens, "objective.noise.replacement=mask")
    assert torch.equal(masked.replaced, task.replaced)
    assert (masked.context[masked.replaced] == CODEBOOK_SIZE).all()
    assert torch.equal(masked.context[~masked.replaced], task.context[~task.replaced])


def test_permutation_moves_noisy_tokens_and_changes_none(tmp_path: Path, tokens: Path) -> None:
    always = ["objective.permutation.start=1", "objective.permutation.end=1"]
    _, task = switched(tmp_path, tokens)
    target, permuted = switched(tmp_path, tokens, *always)
    assert task.order is None
    for name in ("context", "tokens", "replaced"):
        assert torch.equal(getattr(permuted, name), getattr(task, name).gather(1, permuted.order)), name
    assert target.permutation_probability(12) == 1.0
    annealed = objective(tmp_path, tokens, "objective.permutation.start=0.5", "objective.permutation.end=0.75")
    assert [annealed.permutation_probability(step) for step in (1, 7, 9, 10)] == [1.0, 1.0, pytest.approx(1 / 3), 0.0]
    _, spiral = switched(tmp_path, tokens, "objective.permutation.order=spiral_in")
    assert len(spiral.order) == 1
    assert torch.equal(spiral.context, task.context[:, spiral.order[0]])


def head_terms(tmp_path: Path, tokens: Path, *overrides: str, only: str | None = None) -> dict[str, float]:
    target, task = switched(tmp_path, tokens, *overrides)
    draws = torch.Generator().manual_seed(8)
    full = {name: torch.randn(64, 16, 8, generator=draws) for name in ("encode", "decode")}
    if target.cfg.objective.heads.positions == "eq6":  # token i of N, from its own position: encode i, decode i + 1
        full = {"encode": full["encode"][:, :-1], "decode": full["decode"][:, 1:]}
    output = {"logits": torch.randn(64, 16, CODEBOOK_SIZE, generator=draws)}
    output |= {name: full[name] for name in full if only in (None, name)}
    _, statistics = target.loss(output, task)
    return dict(zip(target.names, statistics.tolist(), strict=True))


def test_each_released_form_changes_its_own_term(tmp_path: Path, tokens: Path) -> None:
    paper = head_terms(tmp_path, tokens)
    forms = {
        "objective.heads.encode_counts=clean": {"loss", "loss_encode"},
        "objective.heads.distance=negative_cosine": {"loss", "loss_encode", "loss_decode"},
        "objective.heads.positions=all": {"loss", "loss_encode", "loss_decode"},
        "objective.heads.weight=0.5": {"loss"},
        "objective.heads.lone_term=twice": set(),
    }
    for override, expected in forms.items():
        other = head_terms(tmp_path, tokens, override)
        assert {name for name in paper if other[name] != paper[name]} == expected, override
    # Another constant: 15 of 16 positions are counted.
    offset = head_terms(tmp_path, tokens, "objective.heads.distance=negative_cosine")
    assert paper["loss_encode"] - offset["loss_encode"] == pytest.approx(15 / 16, rel=1e-5)
    once, twice = (
        head_terms(tmp_path, tokens, f"objective.heads.lone_term={form}", only="decode") for form in ("once", "twice")
    )
    assert twice["loss_decode"] == pytest.approx(2 * once["loss_decode"], rel=1e-5)
    assert once["loss_ar"] == paper["loss_ar"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_cross_entropy_of_gpus_is_torchs_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: float
) -> None:
    """Parts of 7 rows, the last one shorter; bf16 gradients are rounded once."""
    monkeypatch.setattr(losses, "_ROWS", 7)
    draws = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(30, 50, generator=draws)).to(dtype).requires_grad_()
    targets = torch.randint(50, (30,), generator=draws)
    found, expected = losses._CrossEntropy.apply(logits, targets), F.cross_entropy(logits.float(), targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(3 * loss, logits)[0] for loss in (found, expected))
    assert ours.dtype == dtype
    assert torch.allclose(ours, theirs, rtol=bound, atol=bound * theirs.abs().max().item())
    again = torch.autograd.grad(3 * losses._CrossEntropy.apply(logits, targets), logits)[0]
    assert torch.equal(again, ours)


def test_the_cross_entropy_of_gpus_keeps_no_second_copy_of_the_logits() -> None:
    kept: list[torch.Tensor] = []
    logits = torch.randn(64, 100, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses._CrossEntropy.apply(logits, torch.zeros(64, dtype=torch.long))
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != logits.data_ptr()) == 64 * (8 + 4)
