"""What runs on the nodes of a Slurm job: open job.py, the steps before and after its tasks, first."""
