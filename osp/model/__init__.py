"""The model: a Llama with exchangeable norms, its loss, generation, and the Hugging Face format."""
