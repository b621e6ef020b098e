"""What a run will take, counted from its recipe before anything is loaded."""
