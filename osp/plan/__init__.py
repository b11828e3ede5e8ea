"""What a training will need, worked out before it starts."""
