"""Which technique works on which detector: the cells that ``tests/det/test_support.py`` tests and ``det/README.md`` shows.

``python tests/support/det_table.py`` writes the table into the README, between its two marks.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "det" / "README.md"
MARKS = "<!-- support table: python tests/support/det_table.py -->", "<!-- end of the support table -->"

DENSE = ("GFL", "ATSS", "RetinaNet", "FCOS", "TOOD", "RTMDet", "RTMDet-Ins", "YOLOX")
STAGED = ("Faster R-CNN", "Mask R-CNN", "Cascade R-CNN")
QUERIES = ("DAB-DETR", "Deformable DETR", "DINO")
MASKED = ("RTMDet-Ins", "Mask R-CNN")
"""Those that train on masks too."""
DETECTORS = (*DENSE, *STAGED, *QUERIES)

_BOUNDED = dict(type="BoundedRegression", margin=1e6)  # with this margin no student is left alone
TECHNIQUES: dict[str, dict[str, Any]] = {
    "`FeatureImitation`": dict(type="FeatureImitation", tap="neck[*]"),
    "… region `foreground`": dict(type="FeatureImitation", tap="neck[*]", region="foreground"),
    "… region `fine_grained`": dict(type="FeatureImitation", tap="neck[*]", region="fine_grained"),
    "… of RoIs": dict(type="FeatureImitation", tap="roi_head.bbox_head:input"),
    "`PearsonImitation`": dict(type="PearsonImitation", tap="neck[*]"),
    "`ChannelWise`": dict(type="ChannelWise", tap="neck[*]", temperature=1.0),
    "`FocalGlobal`": dict(type="FocalGlobal"),
    "`MaskedGeneration`": dict(type="MaskedGeneration"),
    "`ScoredImitation`": dict(type="ScoredImitation"),
    "`SoftTargets`": dict(type="SoftTargets"),
    "… `background_weight`, `hard_weight`": dict(type="SoftTargets", background_weight=1.5, hard_weight=0.5),
    "… anchors `vlr`": dict(type="SoftTargets", anchors="vlr"),
    "… `head='rpn_head'`": dict(type="SoftTargets", head="rpn_head"),
    "`BoundedRegression`": _BOUNDED,
    "… `head='rpn_head'`, boxes": dict(_BOUNDED, head="rpn_head"),
    "`LocalizationDistillation`": dict(type="LocalizationDistillation"),
    "`CrossHead`": dict(type="CrossHead"),
    "`BCKD`": dict(type="BCKD"),
    "`KDDETR`": dict(type="KDDETR", points=0),  # new points in each step are not one batch
    "`InstanceMasks`": dict(type="InstanceMasks"),
}
_ANCHORS = ("GFL", "ATSS", "RetinaNet", "TOOD")
ONLY = {
    "`ScoredImitation`": DENSE,
    "… of RoIs": STAGED,
    "… anchors `vlr`": _ANCHORS,
    "… `head='rpn_head'`": STAGED,
    "… `head='rpn_head'`, boxes": STAGED,
    "`LocalizationDistillation`": ("GFL",),
    "`CrossHead`": ("GFL", "ATSS", "RetinaNet", "FCOS", "RTMDet", "RTMDet-Ins", "YOLOX"),
    "`InstanceMasks`": MASKED,
    "`BCKD`": DENSE,
    "`KDDETR`": QUERIES,
}
"""Where a technique's heads are not there on every detector: those that have them."""


def works(technique: str, detector: str) -> bool:
    """Whether the cell has a ✓."""
    return detector in ONLY.get(technique, DETECTORS)


def term(technique: str, detector: str) -> dict[str, Any]:
    """The cell's term."""
    found = copy.deepcopy(TECHNIQUES[technique])
    if detector == "Cascade R-CNN" and found.get("tap", "").startswith("roi_head"):
        found["tap"] = "roi_head.bbox_head.0:input"
    return found


def table() -> str:
    """The table in Markdown."""
    lines = ["| | " + " | ".join(DETECTORS) + " |", "| --- |" + " :-: |" * len(DETECTORS)]
    for technique in TECHNIQUES:
        cells = " | ".join("✓" if works(technique, detector) else "–" for detector in DETECTORS)
        lines.append(f"| {technique} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from marked import write_between  # beside this file, whose folder is the first of the path

    write_between(README, MARKS, table())
    sys.exit(0)
