"""What the plugins of this distribution tell the command line, apart from them so that reading it imports no framework."""

from kdgraft.hosts import Host

DET = Host(
    "det",
    package="kdgraft_det",
    framework="mmdet",
    trainer="kdgraft_mm.trainer:DET",
    suffixes=(".py",),
    checkpoints=(".pth",),
    demo="kdgraft_det.demo",
    bench="kdgraft_det.bench",
    data="COCO's json",
)
SEG = Host(
    "seg",
    package="kdgraft_seg",
    framework="mmseg",
    trainer="kdgraft_mm.trainer:SEG",
    suffixes=(".py",),
    checkpoints=(".pth",),
    demo="kdgraft_seg.demo",
    bench="kdgraft_seg.bench",
    data="mmseg's layout",
)
NLP = Host(
    "nlp",
    package="kdgraft_nlp",
    framework="transformers",
    trainer="kdgraft_nlp.recipe_trainer:TRAINER",
    suffixes=(".yaml", ".yml", ".toml"),
    demo="kdgraft_nlp.demo",
    bench="kdgraft_nlp.bench",
    data="jsonl",
)
TORCH = Host("torch", package="kdgraft", framework="torch", trainer="kdgraft.plain:TRAINER", suffixes=(".py",))
