"""Scale-out training, sampling and evaluation of visual autoregressive models with reAR.

Its folders and files in their import order: each imports only those before it, and itself. README.md has a line for each.
parallel/facts.py, the table of strategies, imports nothing and stands before all of them.

    config, device, untrusted, progress, text_table, rng, files, locks, weight_file, peers, world
        -> tokenizer -> shards -> objective -> model -> optim -> parallel -> checkpoint -> run -> cli -> scaling
        -> sample -> evaluate -> analysis -> train -> report -> bench, demo
"""

import os

# torch reads it when it is imported. Its warnings about broken connections, with stacks of C++, come from every rank that is
# left when one ends, and bury the line that says which one; rear_scale/peers.py says it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
