"""kdgraft: task-specific distillation for detection, segmentation and language models.

The core: losses, taps, adapters, regions, terms, schedules, sources, the engine, plans. It imports torch and accelerate; the host
plugins ``kdgraft_det``, ``kdgraft_seg`` and ``kdgraft_nlp`` build on it. The public names, in ``__init__.pyi``, are imported when
they are first asked for, so that the command line starts without torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
