"""Files and directories that are there as a whole or not at all."""
