"""Commands that measure servers. Each file holds its configuration, its run and its report."""
