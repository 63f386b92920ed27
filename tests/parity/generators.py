"""Models of the cases: built from a case's config, filled with its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rear_scale.config import HeadsConfig
from rear_scale.model import Generator, build_generator
from rear_scale.model.alitok import feed_forward_width
from rear_scale.model.generator import Shape


def build(case, **heads: object) -> Generator:
    """The generator of a case in eval mode, float32; with the released heads where the case has them."""
    c = case.json["config"]
    alitok = "image_seq_len" in c and "tok_dropout" in c
    side = math.isqrt(c["image_seq_len"])
    shape = Shape(
        depth=c["num_hidden_layers"],
        width=c["hidden_size"],
        num_heads=c["num_attention_heads"],
        mlp_width=case.json.get("feedforward_hidden", feed_forward_width(c["hidden_size"]))
        if alitok
        else c["intermediate_size"],
        num_classes=c["condition_num_classes"],
        codebook_size=c["codebook_size"],
        num_tokens=c["image_seq_len"],
        codebook_dim=c.get("z_dim", 1),
        dropout=c["dropout"],
        attn_dropout=c["attn_drop"],
        embed_dropout=c.get("tok_dropout", 0.0),
        grid=(side, side),
        prefix_tokens=c["image_seq_len"] - side**2,
    )
    model = build_generator("alitok" if alitok else "rar", shape, released_heads(c, **heads)).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in start_weights(case, model).items()})
    return model


def released_heads(c: dict, **changes: object) -> HeadsConfig | None:
    """The heads of a released config; its layer index i is the tap i + 1."""
    if not c.get("transition_alignment"):
        return None
    encode, decode = c["encode_align_layer_idx"], c["decode_align_layer_idx"]
    # The released code looks at the second index only where the first is not met, and at no layer that it does not have.
    depth = c["num_hidden_layers"]
    values = {
        "encode_tap": encode + 1 if encode < depth else None,
        "decode_tap": decode + 1 if decode < depth and decode != encode else None,
        "weight": c["transition_alignment_weight"],
        "hidden": c["projection_dim"],
        "form": "released",
        "positions": "all",
        "encode_counts": "clean",
        "distance": "negative_cosine",
        "lone_term": "twice",
    }
    return HeadsConfig(**{**values, **changes})


def start_weights(case, model: Generator) -> dict:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return case.weights.fill(shapes, case.json["seed"], case.json["gains"])


def array(case, name: str) -> Tensor:
    return torch.from_numpy(case.arrays[name])


def classes(case, model: Generator) -> Tensor:
    """int64 [B]: the class ids of a case, with the null class where its labels are dropped."""
    if "condition" in case:  # a row of the embedding table
        return array(case, "condition") - model.codebook_size - 1
    return array(case, "class_labels").where(~array(case, "drop_mask"), torch.tensor(model.null_class))
