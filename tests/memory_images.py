"""Images that are given as an array."""

import numpy as np


class MemoryImages:
    """`images.Images` of uint8 [N, S, S, 3]."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "row": np.int32(index)}
