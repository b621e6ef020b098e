"""Directories with a config.json on disk, targets and drafters: read, check, make and write them."""
