"""Paper 09: forward learning of graph neural networks."""
