"""Multistep solvers of the probability-flow ODE, exact in its linear part, as weights of the latest estimates of x0.

In lambda = -ln(sigma) the ODE is dx/dlambda = x0(x, lambda) - x, so over a step of length h

    x(lambda + h) = exp(-h) x(lambda) + integral over s in [0, h] of exp(s - h) x0(lambda + s).

A solver puts the polynomial through its latest estimates of x0 in the integral (exponential Adams methods): through one
estimate it is the Euler method (DDIM), through two the published models' RES 2ab (arXiv 2308.02157), equally DPM-Solver++ 2M.
Integrating the polynomial through the estimate at the step's end as well corrects the step once that estimate is known; with
it the network is evaluated no more often than without (UniPC, arXiv 2302.04867).
"""

import math

import torch

# Estimates of x0 that a solver extrapolates from, those that its correction interpolates (0: none), and the grid of noise levels
# that it walks unless told otherwise: the published solvers' is the published one.
SOLVERS = {"unipc": (2, 3, "angle"), "res_2ab": (2, 0, "karras"), "euler": (1, 0, "karras")}


def exponential_weights(nodes: list[float], h: float) -> list[float]:
    """Weights of estimates at lambda + node in the integral over a step of length h; they sum to 1 - exp(-h)."""
    moments = [-math.expm1(-h)]  # of the polynomials 1, s, s^2, ... under exp(s - h)
    for k in range(1, len(nodes)):
        moments.append(h**k - k * moments[-1])
    powers = torch.tensor([[node**k for node in nodes] for k in range(len(nodes))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()


class ExponentialSolver:
    """One run of a solver: keeps the latest estimates of x0 and what the last step took from them."""

    def __init__(self, name: str):
        self.predictor, self.corrector, _ = SOLVERS[name]
        self._estimates = []  # (lambda, x0), the latest first
        self._last = None  # (lambda, length, increment) of the last step

    def step(self, sample: torch.Tensor, denoised: torch.Tensor, sigma: float, target: float) -> torch.Tensor:
        """The sample at noise level `target` > 0, from the one at `sigma` and its estimate of x0."""
        at = -math.log(sigma)
        self._estimates.insert(0, (at, denoised))
        del self._estimates[max(self.predictor, self.corrector) :]
        if self.corrector and self._last is not None:
            start, length, increment = self._last
            # As a difference, so that a change which a callback made to the sample stays.
            sample = sample + (self._increment(self.corrector, start, length) - increment)
        length = math.log(sigma / target)
        increment = self._increment(self.predictor, at, length)
        self._last = (at, length, increment) if self.corrector else None
        return math.exp(-length) * sample + increment

    def _increment(self, count: int, start: float, length: float) -> torch.Tensor:
        latest = self._estimates[:count]
        weights = exponential_weights([at - start for at, _ in latest], length)
        return sum(weight * estimate for weight, (_, estimate) in zip(weights, latest, strict=True))
