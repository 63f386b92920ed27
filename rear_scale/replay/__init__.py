"""Steps of a run made again, and the comparison of two runs. Run folders are only read."""
