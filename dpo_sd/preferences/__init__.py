"""The way of a vote: pair folder, events, log, what the votes come to, parquet. Without torch."""
