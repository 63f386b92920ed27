"""Plain, unoptimised implementations, written for reading: what the fast paths are tested and timed against."""
