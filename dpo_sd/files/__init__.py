"""Bytes on disk: atomic writes, JSON lines, images, sheets, tensors, hashes."""
