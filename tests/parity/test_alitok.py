"""AliTok's generator against the released one."""

from __future__ import annotations

import numpy as np
import torch
from generators import array, build, classes
from test_transformer import Hidden, check_gradients, check_guided_logits

from rear_scale.model.alitok import rotary_table
from rear_scale.objective import losses

FEATURES = 1e-4  # absolute, golden/index.json
GUIDED = 1e-3
ROTARY = 2e-6


def logits_of(case, model):
    return model(array(case, "tokens"), classes(case, model), None)["logits"]


def test_features(case, compare) -> None:
    model = build(case)
    hidden = Hidden(model)
    with torch.no_grad():
        logits = logits_of(case, model)
    hidden.stop()
    # The released model runs the last token too and gives one more position, which nothing uses.
    N = model.num_tokens
    compare("logits", logits, case.arrays["logits"][:, :N], FEATURES)
    if "hidden_first20_last4" in case:
        for number, found in enumerate(hidden.found):
            kept = torch.cat((found[:, :20], found[:, N - 3 :]), dim=1)
            compare(f"hidden {number}", kept, case.arrays["hidden_first20_last4"][number][:, :-1], FEATURES)


def test_rotary_table(case, compare) -> None:
    if "freqs_cis" in case:
        c = case.json["config"]
        shape = build(case).shape
        table = rotary_table(shape.prefix_tokens, shape.grid, c["hidden_size"] // c["num_attention_heads"])
        compare("freqs_cis", table, case.arrays["freqs_cis"], ROTARY)
        assert not np.any(case.arrays["freqs_cis"][0])


def test_loss_and_gradients(case, compare) -> None:
    model = build(case)
    loss, accuracy = losses.next_token(logits_of(case, model), array(case, "tokens"))
    loss.backward()
    compare("loss", loss.detach(), case.json["losses"]["f64"]["loss"], 1e-5)
    compare("accuracy", accuracy, case.json["losses"]["f64"]["correct_tokens"], 1e-6)
    check_gradients(case, compare, model)


def test_guided_cached_decoding(case, compare) -> None:
    check_guided_logits(case, compare, GUIDED)
