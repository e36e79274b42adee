"""Launchers of runs with several processes: `rynnvla launch local | slurm | gke | tpu-vm`."""
