"""The training loop, what it reports, and the folder of a run."""
