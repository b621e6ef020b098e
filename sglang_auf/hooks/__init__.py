"""What the plugin changes in the server process of SGLang."""
