"""The transformer of RAR and reAR against the released ones: features, losses, gradients, guided cached decoding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from generators import array, build, classes
from torch import Tensor, nn

from rear_scale import config
from rear_scale.config import GuidanceConfig, HeadsConfig, SampleConfig
from rear_scale.model import Generator
from rear_scale.objective import Objective, Task, losses
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import CachedDecoding, Decoder

FEATURES = 5e-5  # absolute, golden/index.json
GUIDED = 5e-4
LOSSES = 1e-5


class Hidden:
    """The residual stream after each block."""

    def __init__(self, model: Generator) -> None:
        self.found: list[Tensor] = []
        self.handles = [
            block.register_forward_hook(lambda module, inputs, output: self.found.append(output.detach()))
            for block in model.blocks
        ]

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def order_of(case) -> Tensor | None:
    return array(case, "orders") if "orders" in case else None


def shown(case, name: str = "tokens") -> Tensor:
    order = order_of(case)
    return array(case, name) if order is None else array(case, name).gather(1, order)


def run(model: Generator, case, context: Tensor, order: Tensor | None) -> dict[str, Tensor]:
    unique, rows = classes(case, model).unique(return_inverse=True)
    return model(context, unique, rows, order)


def test_features(case, compare) -> None:
    model = build(case)
    N = model.num_tokens
    for suffix, context in (("", "tokens"), ("_noisy", "perturbed_tokens")):
        if context not in case:
            continue
        hidden = Hidden(model)
        with torch.no_grad():
            output = run(model, case, shown(case, context), order_of(case))
        hidden.stop()
        if f"logits{suffix}" in case:
            # The released model runs the last token too and gives one more position, which nothing uses.
            compare(f"logits{suffix}", output["logits"], case.arrays[f"logits{suffix}"][:, :N], FEATURES)
        for name, positions in (("encode", slice(2, None)), ("decode", slice(1, -1))):
            if f"{name}_z{suffix}" in case:
                compare(f"{name}_z{suffix}", output[name], case.arrays[f"{name}_z{suffix}"][:, positions], FEATURES)
        if not suffix and "hidden" in case:
            for number, found in enumerate(hidden.found):
                compare(f"hidden {number}", found[:, : N + 1], case.arrays["hidden"][number][:, : N + 1], FEATURES)


def test_orders(case, compare) -> None:
    model = build(case)
    if "labels_permuted" in case:
        assert np.array_equal(shown(case), case.arrays["labels_permuted"])
    with torch.no_grad():
        if "logits_raster" in case:
            raster = torch.arange(model.num_tokens)[None]
            for order in (None, raster):
                logits = run(model, case, array(case, "tokens"), order)["logits"]
                compare("logits_raster", logits, case.arrays["logits_raster"][:, :-1], FEATURES)
        if "logits_without_target_aware" in case:
            model.target_aware_pos_embed.zero_()
            logits = run(model, case, shown(case), order_of(case))["logits"]
            compare("no target table", logits, case.arrays["logits_without_target_aware"][:, :-1], FEATURES)


def objective(case, **heads: object) -> Objective:
    """The project's objective, in the released form, on a case's codebook."""
    c = case.json["config"]
    cfg = config.load("rear_xl.yaml", ["strategy=single", "data.assumed_images=100"])
    cfg.tokenizer = dataclasses.replace(cfg.tokenizer, num_tokens=c["image_seq_len"], codebook_size=c["codebook_size"])
    released = {"positions": "all", "encode_counts": "clean", "distance": "negative_cosine", "lone_term": "twice"}
    cfg.objective.heads = HeadsConfig(**{**released, **heads})
    codebook = array(case, "tokenizer_codebook") if "tokenizer_codebook" in case else torch.ones(c["codebook_size"], 1)
    return Objective(cfg, config.derive(cfg, 1, 100), codebook, torch.device("cpu"))


def task(case, noisy: bool) -> Task:
    context = shown(case, "perturbed_tokens" if noisy else "tokens")
    return Task(context, shown(case), order_of(case), array(case, "perturb_mask") if noisy else None)


def test_losses(case, compare) -> None:
    model = build(case)
    if "loss" in case.json["losses"].get("f64", {}):
        with torch.no_grad():
            output = run(model, case, shown(case), order_of(case))
        value, accuracy = losses.next_token(output["logits"], shown(case))
        compare("loss", value, case.json["losses"]["f64"]["loss"], LOSSES)
        compare("accuracy", accuracy, case.json["losses"]["f64"]["correct_tokens"], 1e-6)
        return
    for name, expected in case.json["losses"].items():
        if name == "noisy_decomposition":
            continue
        noisy, values = name.startswith("noisy"), expected["f64"]
        lone = next((term for term in ("encode", "decode") if f"{term}_only" in name), None)
        weight = (
            float(name.split("lambda")[1]) if name[-1].isdigit() else case.json["config"]["transition_alignment_weight"]
        )
        target = objective(case, weight=weight)
        with torch.no_grad():
            output = run(model, case, task(case, noisy).context, None)
            if lone:
                output = {"logits": output["logits"], lone: output[lone]}
            loss, statistics = target.loss(output, task(case, noisy))
        compare(f"{name} loss", loss, values["loss"], LOSSES)
        named = dict(zip(target.names, statistics, strict=True))
        proj_loss = torch.stack((named["loss_encode"], named["loss_decode"])).nansum()
        compare(f"{name} ar_loss", named["loss_ar"], values["ar_loss"], LOSSES)
        compare(f"{name} proj_loss", proj_loss, values["proj_loss"], LOSSES)
        compare(f"{name} accuracy", named["accuracy"], values["correct_tokens"], 1e-6)


def test_the_parts_of_the_alignment_loss(case, compare) -> None:
    if "noisy_decomposition" not in case.json["losses"]:
        assert "perturb_mask" not in case
        return
    expected, model = case.json["losses"]["noisy_decomposition"]["f64"], build(case)
    noisy = task(case, True)
    with torch.no_grad():
        output = run(model, case, noisy.context, None)
    kept = (~noisy.replaced).float().mean().item()
    for name, key, forms, factor in (
        ("encode", "encode_official_masked_mean_over_all", {}, 1.0),
        ("encode", "encode_masked_mean_over_kept", {}, 1 / kept),
        ("encode", "encode_unmasked", {"encode_counts": "all"}, 1.0),
        ("decode", "decode", {}, 1.0),
    ):
        target = objective(case, lone_term="once", **forms)
        _, statistics = target.loss({"logits": output["logits"], name: output[name]}, noisy)
        compare(key, target.statistic(statistics, f"loss_{name}") * factor, expected[key], LOSSES)


def check_gradients(case, compare, model: nn.Module) -> None:
    """Each gradient's norm and its product with a fixed direction: within 1e-4 of its norm, plus 1e-7."""
    expected = case.json["gradients_f64"]["per_parameter"]
    named = dict(model.named_parameters())
    assert named.keys() >= expected.keys()
    for name, values in expected.items():
        gradient = named[name].grad.double()
        probe = torch.from_numpy(case.weights.normal(f"{name}#probe", gradient.shape, case.json["seed"])).double()
        if name in case.json["gradients_f64"]["structurally_zero"]:
            compare(f"zero {name}", gradient.norm(), 0.0, 1e-6)
            continue
        tolerance = 1e-4 * values["norm"] + 1e-7
        compare(f"|{name}|", gradient.norm(), values["norm"], tolerance)
        compare(f"probe {name}", (gradient * probe).sum(), values["dot_probe"], tolerance)


def test_gradients(case, compare) -> None:
    model = build(case)
    noisy = task(case, "perturb_mask" in case)
    output = run(model, case, noisy.context, order_of(case))
    loss, _ = objective(case, weight=case.json["config"].get("transition_alignment_weight", 0.0)).loss(output, noisy)
    loss.backward()
    check_gradients(case, compare, model)
    for name, (first, last, count) in case.json["gradients_f64"].get("nonzero_rows", {}).items():
        rows = dict(model.named_parameters())[name].grad[0].abs().sum(1).nonzero()[:, 0].tolist()
        # The released model also runs the last token as far as its heads read it, and so do we.
        assert (rows[0], rows[-1], len(rows)) == (first, last, count), name


def sampler(case) -> SampleConfig:
    c = case.json["sampler"]
    guidance = GuidanceConfig("power_cosine", c["guidance_scale"], c["guidance_scale_pow"])
    return SampleConfig(temperature=c["randomize_temperature"], guidance=guidance)


def check_guided_logits(case, compare, tolerance: float) -> None:
    model, cfg = (
        build(case, encode_tap=None, decode_tap=None) if "z_dim" in case.json["config"] else build(case),
        sampler(case),
    )
    decoder = Decoder(model, cfg)
    forced = array(case, "teacher_ids")
    labels = array(case, "class_labels")
    state = CachedDecoding(model, Batch(model, labels, labels, None, decoder.guided))
    found = {"cfg_logits": [], "cond_logits": [], "uncond_logits": []}
    with torch.no_grad():
        for step in range(model.num_tokens):
            logits = state.next_logits(forced[:, :step])
            for name, part in zip(("cond_logits", "uncond_logits"), logits.chunk(2), strict=True):
                found[name].append(part)
            found["cfg_logits"].append(decoder.guide(logits, step))
    for name, parts in found.items():
        if name in case:
            compare(name, torch.stack(parts), case.arrays[name], tolerance if name == "cfg_logits" else FEATURES)
    if "cfg_scale" in case:
        for found_scale, scale in zip(decoder.scales, case.arrays["cfg_scale"], strict=True):
            assert found_scale == pytest.approx(scale, rel=2e-6)


def test_guided_cached_decoding(case, compare) -> None:
    check_guided_logits(case, compare, GUIDED)
