"""What is in engines and checkpoints, how two of them differ, and how far an engine is from its model."""
