"""What a server keeps of its answers for training: token ids, in files that are bounded by bytes and age."""
