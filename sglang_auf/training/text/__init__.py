"""From rows of chat data to conversations: token ids, and which of them are labels. No tensors, no model."""
