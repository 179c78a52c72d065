"""Reading and writing videos and training sets."""
