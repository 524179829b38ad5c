"""The recipe as plain data, and the tables of what devices compute."""
