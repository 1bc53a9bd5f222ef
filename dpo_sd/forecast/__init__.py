"""The forecast of a run: memory, operations, time and disk, counted before it runs."""
