"""Transforms that write a bundle's placement: which worker or device holds what."""
