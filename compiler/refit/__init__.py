"""Puts other weights into an engine that is built: by its stored recipes, without lowering the model again."""
