"""One run: prompts to one server, records on disk."""
