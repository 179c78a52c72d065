"""Metrics of reconstruction and of generated worlds."""
