"""The paper's table from the user's own runs: `scripts/ablation.py`."""
