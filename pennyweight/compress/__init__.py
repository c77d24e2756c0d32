"""Transforms that write a bundle's model: fewer bytes, fewer operations."""
