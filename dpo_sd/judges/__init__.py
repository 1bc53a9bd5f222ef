"""Who says which image is better."""
