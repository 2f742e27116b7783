"""Paper 12: NoProp, a stack of blocks that each learn alone to denoise the label."""
