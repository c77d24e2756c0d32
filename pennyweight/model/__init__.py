"""Models as spec and weights, training, metrics, bundles, transforms."""
