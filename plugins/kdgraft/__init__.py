"""kdgraft: task-specific knowledge distillation for detection, segmentation and language models.

The core holds losses, taps, adapters, regions, terms, schedules, sources, the engine and plans. It imports torch and accelerate;
the host plugins ``kdgraft_det``, ``kdgraft_seg`` and ``kdgraft_nlp`` build on it. The public names, listed in ``__init__.pyi``,
are imported on first access, so that the command line starts without torch.

The examples in the docstrings of this package start from here:

    >>> import torch
    >>> from collections import OrderedDict
    >>> from torch import nn
    >>> from kdgraft import *
    >>> from kdgraft.losses import weighted_ratio
    >>> def make_model(width):
    ...     conv, head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width * 64, 5)
    ...     return nn.Sequential(OrderedDict(conv=conv, flat=nn.Flatten(), head=head))
    >>> student, teacher = make_model(4), make_model(8)
    >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 4])
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
