"""Where quantization costs accuracy, layer by layer, and what to do about it."""
