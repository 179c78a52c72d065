"""Published checkpoints of the reference implementation to our classes, and back."""
