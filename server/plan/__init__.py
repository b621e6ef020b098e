"""What a server would take, found before anything is loaded: `python -m server --check`."""
