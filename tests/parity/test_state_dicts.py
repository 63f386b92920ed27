"""Names and shapes of the released weight files, built without memory."""

from __future__ import annotations

import re

import torch
from generators import released_heads

from rear_scale.checkpoint.released import infer
from rear_scale.model import build_generator
from rear_scale.optim.groups import decays


def build(case):
    g, vq = case.json["config"]["generator"], case.json["config"]["vq_model"]
    names = case.json["state_dict"]
    heads = released_heads({**g, "projection_dim": 2048}) if g.get("transition_alignment") else None
    with torch.device("meta"):
        weights = {name: torch.empty(entry["shape"]) for name, entry in names.items()}
        architecture, shape = infer(weights)
        model = build_generator(architecture, shape, heads)
    assert (shape.depth, shape.width, shape.num_heads) == (
        g["num_hidden_layers"],
        g["hidden_size"],
        g["num_attention_heads"],
    )
    assert (shape.mlp_width, shape.num_tokens, shape.codebook_size, shape.num_classes) == (
        g["intermediate_size"],
        g["image_seq_len"],
        vq["codebook_size"],
        g["condition_num_classes"],
    )
    return model


def test_names_shapes_and_counts(case) -> None:
    model = build(case)
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == {name: entry["shape"] for name, entry in case.json["state_dict"].items()}
    assert sum(weight.numel() for weight in model.parameters()) == case.json["total_parameters"]
    backbone = sum(weight.numel() for name, weight in model.named_parameters() if "align_mlp" not in name)
    assert backbone == case.json.get("backbone_without_align_heads", case.json["total_parameters"])


def test_weight_decay_groups(case) -> None:
    if "weight_decay_groups" not in case.json:
        assert "state_dict" in case.json
        return
    listed = case.json["weight_decay_groups"]
    for name, weight in build(case).named_parameters():
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        assert (pattern in listed["decay"]) == decays(name, weight, "released"), name
        assert pattern in listed["decay"] + listed["no_decay"], name
