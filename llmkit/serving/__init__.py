"""From what was trained to answers: which model is meant, how it is loaded or served, and whether it is the same."""
