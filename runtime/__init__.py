"""Loads an engine directory and generates; knows nothing of how the engine was made."""
