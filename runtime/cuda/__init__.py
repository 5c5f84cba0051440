"""What the runtime asks of an NVIDIA GPU: memory, streams, graphs, and the kernels that keep the cache."""
