"""Judges, which say which image is better."""
