"""From conversations to batches of tensors with features. No loss, no optimiser."""
