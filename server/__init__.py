"""One accelerated OpenAI server from one profile: `python -m server --profile NAME`."""
