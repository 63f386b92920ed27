"""reAR's transformer against the released one."""

from __future__ import annotations

import torch

from rear_scale.model.transformer import AdaLNTransformer

TOLERANCE = 5e-5  # absolute, golden/index.json


def build(case) -> AdaLNTransformer:
    c = case.json["config"]
    model = AdaLNTransformer(
        depth=c["num_hidden_layers"],
        width=c["hidden_size"],
        num_heads=c["num_attention_heads"],
        mlp_width=c["intermediate_size"],
        num_classes=c["condition_num_classes"],
        codebook_size=c["codebook_size"],
        num_tokens=c["image_seq_len"],
        codebook_dim=c["z_dim"],
        dropout=c["dropout"],
        attn_dropout=c["attn_drop"],
        heads=None,
    ).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    filled = case.weights.fill(shapes, case.json["seed"], case.json["gains"])
    model.load_state_dict({name: torch.from_numpy(value) for name, value in filled.items()})
    return model


def test_logits(case, compare) -> None:
    model = build(case)
    dropped = torch.from_numpy(case.arrays["drop_mask"]).bool()
    classes = torch.from_numpy(case.arrays["class_labels"]).long().where(~dropped, torch.tensor(model.null_class))
    unique, rows = classes.unique(return_inverse=True)
    for name, context in (("logits", "tokens"), ("logits_noisy", "perturbed_tokens")):
        if name in case:
            with torch.no_grad():
                logits = model(torch.from_numpy(case.arrays[context]).long(), unique, rows)["logits"]
            # The released model runs the last token too and gives one more position, which nothing uses.
            compare(name, logits, case.arrays[name][:, :-1], TOLERANCE)
