"""The search over plans under a budget, with the proof."""
