"""The main jobs, each a file that reads from top to bottom."""
