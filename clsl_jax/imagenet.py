"""The pixels of ImageNet: what networks that were trained on it expect to be taken away."""

import numpy as np

# Of the three channels, in [0, 1].
IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)
