"""How sure a figure is. Numbers in, numbers out."""
