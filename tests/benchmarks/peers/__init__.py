"""Other libraries' quantization-aware training, by their own recipes, beside ours."""
