"""Rewrites from graph to graph, each one file, one class, one job."""
