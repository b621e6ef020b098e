"""Drafters of other trainers, one file for each trainer."""
