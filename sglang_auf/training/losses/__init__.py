"""From a batch and its anchors to loss terms. A new objective is one function in objectives.py."""
