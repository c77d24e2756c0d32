"""Errors, configuration, hardware, budgets, measuring: knows nothing of recommenders."""
