"""Transforms that write a bundle's policy, and the queue that follows it."""
