"""What runs in the scheduler: the algorithm, its worker, how a block is drafted and a token drawn."""
