"""What `llmkit preview` shows: rows in their tokens and the audit, for the terminal and as a page."""
