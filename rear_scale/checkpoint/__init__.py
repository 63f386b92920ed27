"""Checkpoints: the saved states of runs, and all other files that weights are read from.

    folder.py     the layout: names of folders and parts, the integrity check, the last step of a run (imports no torch)
    meta.py       meta.json and the headers of part files, checked before any use
    open.py       selection and opening: `newest_intact` for resuming, `newest_or_refuse` for everything else
    restore.py    loading of a checkpoint into a model or a strategy
    writer.py     writing of a strategy's state, or of tensors, to a folder or a file
    convert.py    conversion between formats (launchers/convert.py)
    released*.py  the published generators: weight files, folders of their trainers, their YAMLs

`--checkpoint PATH` in sampling: `cli.parse_checkpoint` calls `open.open_with_config`, which opens and checks the folder or
file, reads its config and compares the two; `sample.job.load_generator` makes the model, and
`restore.load_generator_weights` fills it.
"""
