"""Plan a training without starting it: memory, traffic and time."""
