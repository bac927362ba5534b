"""Previews: what the current weights say. `base` holds the types, `generate` all the sampling."""
