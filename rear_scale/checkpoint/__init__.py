"""Checkpoints: layout, the finder, the integrity check, the writer, and the official files."""
