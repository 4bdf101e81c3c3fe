"""Jobs of slurm: what a recipe asks of a cluster, the batch file for it, the nodes tried before a run."""
