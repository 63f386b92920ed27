"""Run folders, resumable stages, wandb and TensorBoard, versions and requeueing."""
