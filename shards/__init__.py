"""WebDataset tar shards: pack, index, verify and read them. Knows tar files and images, and nothing of training."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that holds both packages
