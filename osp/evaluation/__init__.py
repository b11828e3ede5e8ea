"""Evaluate a model, quantized or not: perplexity and tasks."""
