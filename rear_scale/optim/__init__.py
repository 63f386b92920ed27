"""Optimizers: update rules per parameter, learning-rate schedules and implementations of AdamW."""
