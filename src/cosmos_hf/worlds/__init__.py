"""Simulated worlds (MuJoCo) that make data with exact ground truth; optional extra `worlds`."""
