"""Annotators: people, who vote in an app, and simulated ones, who vote by a judge."""
