"""What the plugin changes in SGLang by hooks: replies, requests, counts, logs, and where an answer ends."""
