"""Weights of a step to a preview server, and its answers back."""
