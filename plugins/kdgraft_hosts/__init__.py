"""What the plugins of this distribution tell the command line, apart from them so that reading it imports no framework."""

from kdgraft.hosts import Host

DET = Host("det", "kdgraft_det", "mmdet", "kdgraft_mm.trainer:DET", (".py",), "kdgraft_det.demo", "kdgraft_det.bench")
SEG = Host("seg", "kdgraft_seg", "mmseg", "kdgraft_mm.trainer:SEG", (".py",), "kdgraft_seg.demo", "kdgraft_seg.bench")
NLP = Host(
    "nlp",
    "kdgraft_nlp",
    "transformers",
    "kdgraft_nlp.recipe_trainer:TRAINER",
    (".yaml", ".yml", ".toml"),
    "kdgraft_nlp.demo",
    "kdgraft_nlp.bench",
)
TORCH = Host("torch", "kdgraft", "torch", "kdgraft.plain:TRAINER", (".py",))
