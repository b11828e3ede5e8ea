"""Watch outliers form: statistics of activations, the probe that measures them, alerts, and forensics."""
