"""From rows of a file to batches of tensors with features. No loss, no optimiser."""
