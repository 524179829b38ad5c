"""The scripts that go into a bundle as they are: plain Python on numpy and TI's onnxruntime."""
