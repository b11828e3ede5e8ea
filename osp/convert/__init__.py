"""Write a model in another form: another norm, or a stock Hugging Face Llama with a model card."""
