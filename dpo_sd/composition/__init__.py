"""From settings to objects: types, checks, messages, and the entry point of every command."""
