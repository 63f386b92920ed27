"""Planning: memory, time and cost of a run on a cluster, before it is started."""
