"""Reproduce the paper's table with new runs: `scripts/ablation.py`."""
