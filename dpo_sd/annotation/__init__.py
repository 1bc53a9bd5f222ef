"""The annotation app: two or four pictures, one key for the better one, every vote on disk at once."""
