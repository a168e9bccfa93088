"""What the plugins of this distribution tell the command line, apart from them so that reading it imports no framework."""

from kdgraft.hosts import Host

DET = Host(
    "det",
    package="kdgraft_det",
    framework="mmdet",
    trainer="kdgraft_mm.trainer:DET",
    suffixes=(".py",),
    checkpoints=(".pth",),
    demo="kdgraft_bench.demos.det",
    bench="kdgraft_bench.costs.det",
    data="COCO's json",
)
SEG = Host(
    "seg",
    package="kdgraft_seg",
    framework="mmseg",
    trainer="kdgraft_mm.trainer:SEG",
    suffixes=(".py",),
    checkpoints=(".pth",),
    demo="kdgraft_bench.demos.seg",
    bench="kdgraft_bench.costs.seg",
    data="mmseg's layout",
)
NLP = Host(
    "nlp",
    package="kdgraft_nlp",
    framework="transformers",
    trainer="kdgraft_nlp.recipe_trainer:TRAINER",
    suffixes=(".yaml", ".yml", ".toml"),
    demo="kdgraft_bench.demos.nlp",
    bench="kdgraft_bench.costs.nlp",
    data="jsonl",
)
TORCH = Host("torch", package="kdgraft", framework="torch", trainer="kdgraft.plain:TRAINER", suffixes=(".py",))
