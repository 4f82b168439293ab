"""Several LoRA runs in one process on one frozen base: each with a trainer of its own, together in what they share."""
