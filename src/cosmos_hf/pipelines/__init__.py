"""Pipelines: user input in, video out."""
