"""The first command: the whole path on handwritten digits."""
