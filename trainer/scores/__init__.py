"""Scores of answers: how they are computed, and what can be said of their means."""
