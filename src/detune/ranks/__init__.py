"""Ranks near the storage noise, found from all models together."""
