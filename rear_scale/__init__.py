"""Scale-out training, sampling and evaluation of visual autoregressive models with reAR.

As a library, it offers the names of `__all__`; api.py documents them, and is imported when one of them is first used. They keep
their arguments and results within a minor version (`__version__`); everything else may change with any commit.

    import rear_scale
    m = rear_scale.load("runs/rear_xl", tokenizer="maskgit-vqgan-imagenet-f16-256.bin")
    images = m.sample(classes=[207] * 8, seed=0)

Its folders and files in their import order: each imports only those before it, and itself. docs/architecture.md has a line for
each. parallel/facts.py, the table of strategies, imports nothing and stands before all of them.

    places, config, device, untrusted, progress, text_table, figures, intervals, rng, files, locks, weight_file, peers, world
        -> tokenizer -> shards -> objective -> model -> optim -> parallel -> checkpoint -> run -> cli -> sample
        -> evaluate -> analysis -> scaling -> train -> replay -> report -> api
        -> bench, demo, fresh_build, __main__
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rear_scale.api import ImageScores, InputError, Model, evaluate, load

# torch reads this variable when it is imported. When one rank ends, every other rank would print torch's warnings about broken
# connections with their C++ stacks, and bury the line from rear_scale/peers.py that names the rank that ended.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
__all__ = ["ImageScores", "InputError", "Model", "__version__", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    """The object of a name in `__all__`. It is imported at its first use, so that commands such as rear_scale.run.requeue start
    without importing torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rear_scale import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
