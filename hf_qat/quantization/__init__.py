"""The numerics: fake quantization and its gradients, observers, scales, layers, integer storage; no graphs."""
