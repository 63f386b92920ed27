"""Token sequences <-> tar shards, and image shards in."""
