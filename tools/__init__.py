"""The commands and the developer scripts; no logic of their own."""
