"""The graph: onnx_ir and the trtllm operator dialect."""
