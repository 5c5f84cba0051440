"""A model as somebody published it becomes a checkpoint: the only room that reads foreign model files."""
