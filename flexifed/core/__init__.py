"""The paper: layer signatures, the prefix trie, the five schemes, and the mean. Pure: no Ray, no files, no training."""
