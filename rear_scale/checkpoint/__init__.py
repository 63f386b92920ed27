"""Checkpoints: what a run saves, and every file that weights come from.

    folder.py    the layout: names of folders and parts, the integrity check, the last step of a run (imports no torch)
    meta.py      meta.json and heads of parts, checked before use
    open.py      the finder: `newest_intact` to resume, `newest_or_refuse` for all else, `open_source` for --checkpoint
    restore.py   from a checkpoint into a model or a strategy
    writer.py    from a strategy, or from tensors, to a folder or a file
    convert.py   launchers/convert.py
    released*.py the published generators: their weight files, their trainers' folders and YAMLs

Sampling: `cli.parse_checkpoint` calls `open.open_with_config`, which finds, checks and opens; `sample.job.load_generator`
makes the model and calls `restore.load_generator_weights`.
"""
