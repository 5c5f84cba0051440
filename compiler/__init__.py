"""From a checkpoint to an engine directory: the graph, the model builders, the targets, the order of stages."""
