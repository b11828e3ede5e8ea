"""Train: resolve the configuration, set everything up, and run the loop on DeepSpeed."""
