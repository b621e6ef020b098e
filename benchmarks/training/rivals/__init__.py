"""Drivers: one training step of each package, run by the interpreter of that package's environment."""
