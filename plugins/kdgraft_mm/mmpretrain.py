"""MMPretrain's models for configs that name ``mmpretrain.ResNet``: ``custom_imports = dict(imports=["kdgraft_mm.mmpretrain"])``.

mmengine imports them by itself too, where that works; this import says in one line what is missing, and works beside transformers 5.
"""

from kdgraft.sources.mmpretrain import import_mmpretrain

import_mmpretrain("custom_imports")
