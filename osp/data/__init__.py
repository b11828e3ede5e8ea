"""Text becomes token sequences: sources -> prepare -> shards on disk -> loader."""
