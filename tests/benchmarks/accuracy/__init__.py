"""What quantization costs in accuracy: nets, targets and methods on tasks made here, on ONNX Runtime."""
