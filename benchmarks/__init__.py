"""The tau benchmark: `python -m benchmarks {run,compare,lossless}`, against a server given by URL or started here."""
