"""Pages that a run leaves for people: HTML in one file, from what lies in the run's folder and nothing else."""
