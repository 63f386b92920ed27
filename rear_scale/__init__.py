"""Scale-out training, sampling and evaluation of visual autoregressive models with reAR.

The path of the data, in the order in which the modules may import each other:

    config, rng, files, locks, world -> tokenizer -> shards -> model -> interop -> objective -> parallel -> train
        -> sample -> evaluate -> analysis -> scaling -> report -> bench, demo
"""

__version__ = "0.1.0"
