"""Runs a model's own graph on text, layer by layer, and quantizes each layer by what passed through it."""
