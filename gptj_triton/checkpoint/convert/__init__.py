"""The converter between Hugging Face's and FasterTransformer's checkpoints."""
