"""Sampling: checkpoint -> images, by cached decoding with guidance, distributed over ranks."""
