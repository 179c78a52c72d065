"""From what a user has (frames, text, actions) to what a network takes: pure functions, no modules."""
