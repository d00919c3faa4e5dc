"""One torch thread per test process: two workers that spin two threads each on two cores crawl."""

import torch

torch.set_num_threads(1)
