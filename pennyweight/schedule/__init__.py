"""The transform that writes a bundle's policy, and the scheduler that follows it."""
