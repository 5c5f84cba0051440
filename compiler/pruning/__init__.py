"""Pruning: weights taken out of checkpoints and engines, and models made smaller by what matters least."""
