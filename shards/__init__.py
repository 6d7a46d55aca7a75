"""WebDataset tar shards: pack, index, verify and read them. Knows tar files and images, and nothing of training."""
