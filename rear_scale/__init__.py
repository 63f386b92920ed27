"""Scale-out training, sampling and evaluation of visual autoregressive models with reAR.

The path of the data, in the order in which the modules may import each other:

    config, rng, files, locks, world -> tokenizer -> shards -> model -> interop -> objective -> parallel -> train
        -> sample -> evaluate -> analysis -> scaling -> report -> bench, demo
"""

import os

# torch reads it when it is imported. Its warnings about broken connections, with stacks of C++, come from every rank that is
# left when one ends, and bury the line that says which one; rear_scale/peers.py says it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
