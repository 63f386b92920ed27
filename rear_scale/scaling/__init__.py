"""What a run needs and costs on a cluster, before it is started."""
