"""Our checkpoint format: config, canonical tensor names, lazy tensors, recipes; knows no graph."""
