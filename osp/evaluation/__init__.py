"""What a model is worth: perplexity and tasks, as it is and quantized."""
