"""mypy finds nothing in the package, the launchers and data/, and a program that uses the library sees its types."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

# A line of what mypy says of the client for each comment in it: the type that it reveals, or the code of the error.
CLIENT = """
import rear_scale

m = rear_scale.load("runs/rear_xl", overrides=["sample.batch_size=8"])
images = m.sample(classes=[207] * 8, seed=0)
reveal_type(images)  # numpy.ndarray
reveal_type(m.encode(images))  # torch._tensor.Tensor
reveal_type(m.sample_tokens([207]))  # torch._tensor.Tensor
reveal_type(m.decode([[1, 2], [3, 4]]))  # numpy.ndarray
reveal_type(m.loss(m.encode(images), [207] * 8))  # "dict[str, torch._tensor.Tensor]"
reveal_type(m.model)  # rear_scale.model.generator.Generator
reveal_type(m.config.optim.lr)  # "float"
reveal_type(m.config.data.train)  # "str | None"
scores = rear_scale.evaluate(images, {"a": "a.npz"})
reveal_type(scores)  # rear_scale.evaluate.result.ImageScores
reveal_type(scores.networks["inception"].samples)  # "int"
m.sample(classes="207")  # [arg-type]
m.loss(m.encode(images), [207], step="last")  # [arg-type]
m.config.optim.learning_rate  # [attr-defined]
rear_scale.load(1)  # [arg-type]
"""


def test_mypy_finds_no_errors_and_clients_see_the_types(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    # Other content each time: mypy would repeat what it said of the same module in another folder.
    client.write_text(f"{CLIENT}# {client}\n")
    files = [*(str(ROOT / folder) for folder in ("rear_scale", "launchers", "data")), str(client)]
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--show-absolute-path", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith(f"{client}:")]
    others = [line for line in done.stdout.splitlines() if not line.startswith(f"{client}:")]
    assert not others, done.stdout
    assert not done.stderr
    found = {int(line.split(":")[1]): line for line in said}
    expected = {
        number: comment
        for number, line in enumerate(CLIENT.splitlines(), 1)
        for comment in re.findall(r"  # (.*)", line)
    }
    assert found.keys() == expected.keys(), done.stdout
    for number, comment in expected.items():
        assert comment in found[number], found[number]
