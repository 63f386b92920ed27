"""A run's folder and what is written beside its numbers."""
