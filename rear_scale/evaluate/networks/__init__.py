"""Networks whose features are scored, and their features in blocks."""
