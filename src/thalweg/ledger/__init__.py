"""What a gradient costs, and how right it is."""
