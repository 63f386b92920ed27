"""Images to score, from any source."""
