"""Paper 15: which order of derivative to buy, from backprop to values alone."""
