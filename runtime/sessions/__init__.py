"""One session for each engine kind."""
