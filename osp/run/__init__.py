"""Files of a run: folder, checkpoints, metrics, events and records of evaluations, written and read."""
