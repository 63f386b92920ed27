"""Run folders, resumable stages, wandb, versions and requeueing."""
