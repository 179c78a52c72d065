"""Training: one `fit` loop, and per model family a `build_model` and a `compute_loss`."""
