"""Benchmarks, compared with plain reference implementations; one module per mode of launchers/bench.py.

A mode has `add_arguments(parser)` and `run(arguments)`, which returns the values of its JSON object.
"""
