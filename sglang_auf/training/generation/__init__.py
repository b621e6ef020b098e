"""Asking a server for prompts and answers, and writing them to a file that survives a kill."""
