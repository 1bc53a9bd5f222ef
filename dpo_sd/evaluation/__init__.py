"""Is it better? Images of both sides from the same prompts and seeds, and their comparison by a judge."""
