"""Code that the MMDetection and MMSegmentation plugins share because both hosts are built on mmengine.

Importing it puts in order what the import of mmengine, and of a host, needs.
"""

from kdgraft.formatter import import_yapf
from kdgraft.sources.mmpretrain import leave_out_multimodal

import_yapf()
leave_out_multimodal()
