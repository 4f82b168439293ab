"""llmkit: a handful of words into a fine-tuned, tracked and served language model."""

__version__ = "0.1.0"
