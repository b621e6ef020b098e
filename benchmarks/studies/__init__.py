"""Studies: training arms with seeds, from a YAML file to verdicts."""
