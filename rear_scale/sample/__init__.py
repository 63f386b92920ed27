"""Checkpoint -> images: cached decoding with guidance, shared out over ranks."""
