"""Words for directions as a camera sees them, which simulated captions are written in and evaluations read."""

DIRECTIONS = ("to the right", "to the left", "away from the camera", "towards the camera")
