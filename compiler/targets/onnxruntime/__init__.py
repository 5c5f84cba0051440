"""The onnxruntime target: an ONNX model with external weights."""
