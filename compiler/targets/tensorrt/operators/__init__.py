"""How each operator of the graph becomes layers of a TensorRT network; no file here imports the library."""
