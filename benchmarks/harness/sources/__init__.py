"""Where prompts come from: files of the hub, and files of a user."""
