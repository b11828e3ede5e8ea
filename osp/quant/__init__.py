"""Quantize a model: number formats, round-to-nearest, GPTQ, and Hadamard and learned rotations."""
