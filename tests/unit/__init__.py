"""Parts that need neither a worker nor a real filesystem."""
