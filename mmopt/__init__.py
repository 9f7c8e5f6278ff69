"""mmopt: a graph optimizer and compiler for multimodal models."""
