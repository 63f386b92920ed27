"""Linear CKA of the features of every layer with the codebook embeddings of the current and the next token (reAR Eq. 13,
appendix C.2, Figures 8b and 8c).

With features X [n, D] and embeddings Y [n, Z], centered over the n tokens, the Gram form of Eq. 13 equals
|X'Y|^2 / (|X'X| |Y'Y|) with Frobenius norms. Sums of products over the tokens are all that it needs, so that n is not bounded
by memory.
"""

# n tokens, B images of a batch, N tokens of an image, T taps, D width of the model, Z width of a code

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Row
from rear_scale.analysis.plots import colour, finish, line, models_of, panels
from rear_scale.analysis.token_sets import TokenWork
from rear_scale.figures import png
from rear_scale.model import Generator
from rear_scale.objective.terms import Feature
from rear_scale.tokenizer import weights_sha256

TARGETS = ("current", "next")
# Variance below this fraction of the squared mean is rounding: sums are float64 of float32 features, which resolve 1e-7.
_NO_VARIANCE = 1e-14
_BLOCKS = 16  # each is a file with the products of all layers, so there are few


def linear_cka(sums: dict[str, np.ndarray], count: int) -> float:
    """Eq. 13 with the linear kernel, from sums over `count` rows of features x [n, D] and embeddings y [n, Z].

    sums: "x" [D], "y" [Z], "xx" = x'x [D, D], "yy" [Z, Z] and "xy" [D, Z], float64. NaN where one side has no variance: none
    above the rounding of its sums.
    """

    def centered(name: str) -> np.ndarray:
        a, b = sums[name[0]], sums[name[1]]
        return sums[name] - np.outer(a, b) / count

    norms = [float(np.linalg.norm(centered(name))) for name in ("xx", "yy")]
    if any(
        not norm > _NO_VARIANCE * np.linalg.norm(sums[name]) for norm, name in zip(norms, ("xx", "yy"), strict=True)
    ):
        return float("nan")
    return float(np.linalg.norm(centered("xy")) ** 2 / (norms[0] * norms[1]))


class Cka(TokenWork):
    """Sums of products of the features at each tap with the embeddings of the current and of the next token.

    A token's features are those at its own position, as reAR's heads have them, for tokens 1 to N - 1 of N.
    """

    @property
    def block_images(self) -> int:
        return max(1, -(-len(self.ids) // _BLOCKS))

    @property
    def identity(self) -> dict[str, Any]:
        found = {**super().identity, "batch": self.cfg.evaluate.batch_size}
        if self.val.manifest.codebook_sha256 is None:  # the codebook is that of the tokenizer's weights
            found["tokenizer"] = self.world.on_main(lambda: weights_sha256(self.cfg.tokenizer))
        return found

    @property
    def taps(self) -> range:
        return range(self.cfg.model.depth + 1)

    @cached_property
    def model(self) -> Generator:
        model = super().model
        model.features = tuple(Feature(f"tap{tap}", tap, "inner") for tap in self.taps)
        return model

    def compute(self, number: int) -> Arrays:
        sums: dict[str, Tensor] = {}
        size, ids = self.cfg.evaluate.batch_size, self.blocks[number]
        for start in range(0, len(ids), size):
            for name, value in self._products(ids[start : start + size]):
                sums[name] = value if name not in sums else sums[name] + value
        count = len(ids) * (self.cfg.tokenizer.num_tokens - 1)
        return {**{name: value.cpu().numpy() for name, value in sums.items()}, "count": np.array(count)}

    def _products(self, ids: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """Yields the sums of `linear_cka` over the tokens of a batch, with their tap and target, in float64."""
        truth, labels, index = self.rows(self.val, ids)
        task = self.task(truth, index)
        output = self.predict(task, labels)
        of_targets = zip(TARGETS, (task.tokens[:, :-1], task.tokens[:, 1:]), strict=True)
        embeddings = {target: self.codebook[tokens.flatten()].double() for target, tokens in of_targets}
        for target, y in embeddings.items():
            yield from ((f"y_{target}", y.sum(0)), (f"yy_{target}", y.T @ y))
        for tap in self.taps:
            x = output[f"tap{tap}"].flatten(0, 1).double()
            yield from ((f"x{tap}", x.sum(0)), (f"xx{tap}", x.T @ x))
            yield from ((f"xy{tap}_{target}", x.T @ y) for target, y in embeddings.items())

    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """CKA, float64 [T], by target, and the number of tokens."""
        sums: Arrays = {}
        for block in blocks:
            for name, value in block.items():
                sums[name] = value if name not in sums else sums[name] + value
        found: Arrays = {"count": sums["count"]}
        for target in TARGETS:
            found[target] = np.array([linear_cka(self._of(sums, tap, target), int(sums["count"])) for tap in self.taps])
        return found

    @staticmethod
    def _of(sums: Arrays, tap: int, target: str) -> dict[str, np.ndarray]:
        return {
            "x": sums[f"x{tap}"], "xx": sums[f"xx{tap}"], "y": sums[f"y_{target}"], "yy": sums[f"yy_{target}"],
            "xy": sums[f"xy{tap}_{target}"],
        }  # fmt: skip


def tables(analysed: Analysed) -> dict[str, list[Row]]:
    """A row for each tap and target; and in `peaks` the tap where CKA with each target is largest."""
    arrays, about = analysed.arrays, analysed.subject.about
    depth = analysed.subject.cfg.model.depth
    rows, peaks = [], []
    for target in TARGETS:
        values = arrays[target]
        for tap, value in enumerate(values):
            rows.append({**about, "target": target, "tap": tap, "depth": tap / depth, "cka": float(value),
                         "counted": int(arrays["count"])})  # fmt: skip
        peak = int(np.nanargmax(values)) if np.isfinite(values).any() else 0  # peak_cka is NaN without any
        peaks.append({**about, "target": target, "peak_tap": peak, "peak_depth": peak / depth, "peak_cka": float(values[peak]),
                      "first_cka": float(values[0]), "last_cka": float(values[-1]),
                      "falls": float(np.mean(np.diff(values) < 0))})  # fmt: skip
    return {"": rows, "peaks": peaks}


def best_taps(analysed: Analysed) -> tuple[int, int] | None:
    """The taps for heads on the current and the next token: where CKA is largest before the last block's output, which the paper
    leaves to the prediction itself; None where no tap has a finite value."""
    current, following = (analysed.arrays[target][:-1] for target in TARGETS)
    if not (np.isfinite(current).any() and np.isfinite(following).any()):
        return None
    return int(np.nanargmax(current)), int(np.nanargmax(following))


def lines(analysed: Sequence[Analysed]) -> list[str]:
    """The peaks of each checkpoint, and the taps that they suggest for the heads of a model of this size."""
    found = []
    for one in analysed:
        current, following = tables(one)["peaks"]
        depth, taps = one.subject.cfg.model.depth, best_taps(one)
        if taps is None:
            name = f"{one.subject.model} ({one.subject.cfg.run.name})"
            found.append(f"{name}: no CKA is finite. Its features or the codebook are not finite, or do not vary")
            continue
        encode, decode = taps
        found.append(
            f"{one.subject.model} ({one.subject.cfg.run.name}): CKA with the current token peaks at tap {current['peak_tap']} "
            f"of {depth} ({current['peak_cka']:.3f}), with the next one at tap {following['peak_tap']} "
            f"({following['peak_cka']:.3f}). Before the last layer: "
            f"objective.heads.encode_tap={encode} objective.heads.decode_tap={decode}"
        )
    return found


def figures(analysed: Sequence[Analysed]) -> dict[str, bytes]:
    """CKA over layers (Figures 8b and 8c)."""
    rows = [row for one in analysed for row in tables(one)[""]]
    figure, axes = panels(2)
    for panel, target in zip(axes, TARGETS, strict=True):
        for number, model in enumerate(models_of(rows)):
            own = [row for row in rows if (row["model"], row["target"]) == (model, target)]
            line(panel, own, "tap", "cka", model, colour(number))
            means = {
                tap: np.mean([row["cka"] for row in own if row["tap"] == tap]) for tap in {row["tap"] for row in own}
            }
            peak = max(means, key=lambda tap: means[tap])
            panel.axvline(peak, color=colour(number), lw=0.8, ls=":")
        title = "current token (encoded embedding)" if target == "current" else "next token (decoded embedding)"
        finish(panel, "tap (blocks before it)", "linear CKA", title)
    return {"": png(figure)}


EXPERIMENT = Experiment(
    name="cka",
    source="reAR, Figures 8b and 8c, Eq. 13 and appendix C.2",
    work=Cka,
    keys=("target", "tap", "depth"),
    tables=tables,
    figures=figures,
    inputs=("data.val",),
    lines=lines,
)
