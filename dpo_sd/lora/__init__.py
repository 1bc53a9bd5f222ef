"""The way of a LoRA file: file ↔ names ↔ adapters, and what other programs read of it."""
