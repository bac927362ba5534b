"""Scores of answers: what they measure, how they are computed, and what can be said of their means."""
