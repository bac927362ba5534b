"""From file rows to batches: formats, encoding, split, data card, order, collation."""
