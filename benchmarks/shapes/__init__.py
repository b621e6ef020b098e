"""A target and a drafter of random weights in a real model's shape, and a server of them: what a step costs."""
