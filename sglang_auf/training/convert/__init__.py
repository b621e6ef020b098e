"""Drafters of other trainers, one file a trainer."""
