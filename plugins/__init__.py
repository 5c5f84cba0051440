"""CUDA kernels, and the thin skins that show them to each engine library."""
