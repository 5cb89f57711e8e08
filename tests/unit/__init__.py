"""Parts that need neither a worker nor a filesystem of their own."""
