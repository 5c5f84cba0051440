"""What each engine kind can run, as data, and how it is emitted."""
