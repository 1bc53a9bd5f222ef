"""The way of a vote: pair folder, events, log, outcome, metadata, parquet. Without torch."""
