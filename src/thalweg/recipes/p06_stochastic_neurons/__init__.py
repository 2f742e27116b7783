"""Paper 06: estimating or propagating gradients through stochastic neurons for conditional computation."""
