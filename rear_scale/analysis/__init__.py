"""The papers' consistency experiments, one file per figure family."""
