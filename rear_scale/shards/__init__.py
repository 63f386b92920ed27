"""Reading and writing of token shards, and reading of image folders and image shards."""
