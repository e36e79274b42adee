"""From one command to many processes: `rynnvla launch local | slurm | gke | tpu-vm`, and how they find each other."""
