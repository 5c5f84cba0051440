"""Quantized Hugging Face checkpoints: what each method packs into which tensors."""
