"""Commands that measure training. Each file holds its configuration, its run and its report."""
