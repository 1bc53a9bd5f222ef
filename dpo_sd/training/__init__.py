"""The step, and all that a run of it needs: trainer, optimisers, hardware, checkpoints, resuming."""
