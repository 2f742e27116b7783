"""Paper 10: bidirectional learning for robust neural networks."""
