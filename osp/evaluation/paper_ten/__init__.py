"""The ten benchmarks of OSP (arXiv 2506.19697) as its authors ran them, as tasks of the lm-evaluation-harness."""
