"""The tensorrt target: a serialized TensorRT plan, built without a GPU by TensorRT-RTX."""
