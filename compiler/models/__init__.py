"""One file an architecture family: checkpoint in, graph out."""
