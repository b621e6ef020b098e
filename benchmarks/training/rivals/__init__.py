"""Drivers: one training step of each package, each run by the interpreter of that package's own environment."""
