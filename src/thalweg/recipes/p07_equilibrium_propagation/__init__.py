"""Paper 07: equilibrium propagation, between energy-based models and backpropagation."""
