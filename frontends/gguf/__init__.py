"""GGUF files become checkpoints: container, tensors, config and tokenizer, each in its file."""
