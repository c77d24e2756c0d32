"""Transforms that write a bundle's runtime, and the engines that run it."""
