"""Checkpoints: what a run saves, and every file that weights come from.

    folder.py     the layout: names of folders and parts, the integrity check, the last step of a run (imports no torch)
    meta.py       meta.json and the heads of parts, checked before anything of them is used
    open.py       the finder: `newest_intact` for resuming, `newest_or_refuse` for everything else
    restore.py    from a checkpoint into a model or a strategy
    writer.py     from a strategy, or from tensors, to a folder or a file
    convert.py    from one form into another (launchers/convert.py)
    released*.py  the published generators: weight files, folders of their trainers, their YAMLs

The way of `--checkpoint PATH` in sampling: `cli.parse_checkpoint` calls `open.open_with_config`, which finds the folder or
file, checks it, reads its config and compares the two; `sample.job.load_generator` makes the model, and
`restore.load_generator_weights` fills it.
"""
