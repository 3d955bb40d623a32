"""From class names to label embeddings."""
