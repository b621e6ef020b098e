"""The drafter as a torch module: what the trainer trains and the reference decodes with. Imports torch only."""
