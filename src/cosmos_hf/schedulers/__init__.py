"""Noise schedules and solvers; the one owner of the noise maths (sigma_data, preconditioning, loss weights)."""
