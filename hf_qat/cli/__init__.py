"""The command line, `hf-qat`."""
