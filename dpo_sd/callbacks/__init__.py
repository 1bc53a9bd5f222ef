"""Watchers of a run: metrics, samples, health, LoRA files, checkpoints, the verdict; and the table of a sweep."""
