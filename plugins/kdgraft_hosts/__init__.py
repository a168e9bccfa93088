"""Hosts of the plugins in this distribution, in a package of their own so that importing them imports no framework."""

from kdgraft.hosts import FOLDER, Host
from kdgraft.registry import RECIPES, SOURCES, TERMS, Registry

DET = Host(
    "det",
    package="kdgraft_det",
    framework="mmdet",
    trainer="kdgraft_mm.trainer:DET",
    suffixes=(".py",),
    checkpoints=(".pth",),
    benchmark="kdgraft_bench.hosts.det:DetectionBench",
    costs="kdgraft_bench.costs.det",
    data="COCO's json",
    terms=Registry("term", "kdgraft.det.terms", parent=TERMS, home="kdgraft_det:TERMS"),
    recipes=Registry("recipe", "kdgraft.det.recipes", parent=RECIPES, home="kdgraft_det:RECIPES"),
    lacks={
        "classifiers": "an image of a detector has many objects, and samples near a boundary one class; use SoftTargets",
        "generators": "a detector makes no images; generators are models of plain PyTorch",
        "images": "a detector's loss depends on its own anchors, not on class scores with labels; use AttentionTransfer",
        "queries": "images are no candidates of a query; rankers are models of Hugging Face, or plain PyTorch",
        "single-label": "a detector classifies objects, not images; use FeatureImitation with the source Itself",
    },
    refuses={"ensemble": "boxes of several detectors have no mean; make the ensemble the teacher of a run"},
)
SEG = Host(
    "seg",
    package="kdgraft_seg",
    framework="mmseg",
    trainer="kdgraft_mm.trainer:SEG",
    suffixes=(".py",),
    checkpoints=(".pth",),
    benchmark="kdgraft_bench.hosts.seg:SegmentationBench",
    costs="kdgraft_bench.costs.seg",
    data="mmseg's layout",
    terms=Registry("term", "kdgraft.seg.terms", parent=TERMS, home="kdgraft_seg:TERMS"),
    recipes=Registry("recipe", "kdgraft.seg.recipes", parent=RECIPES, home="kdgraft_seg:RECIPES"),
    lacks={
        "classifiers": "an image of a segmentor has many classes, and samples near a boundary one; use SoftTargets",
        "generators": "a segmentor makes no images; generators are models of plain PyTorch",
        "numbers": "a segmentor predicts the classes of pixels; use terms on class scores, such as SoftTargets",
        "boxes": "a segmentor's data have masks; use MaskedGeneration",
        "queries": "images are no candidates of a query; rankers are models of Hugging Face, or plain PyTorch",
        "single-label": "a segmentor classifies pixels, not images; use FeatureImitation with the source Itself",
    },
    refuses={
        "ensemble": "a config builds one segmentor; make the ensemble the teacher of a run",
        "data.labels": "a segmentor's own loss reads a map of each picture; give it maps of 255, which are ignored, and the term TaskShare",
    },
)
NLP = Host(
    "nlp",
    package="kdgraft_nlp",
    framework="transformers",
    trainer="kdgraft_nlp.recipe_trainer:TRAINER",
    suffixes=(".yaml", ".yml", ".toml"),
    checkpoints=(FOLDER,),
    benchmark="kdgraft_bench.hosts.nlp:TextBench",
    costs="kdgraft_bench.costs.nlp",
    data="jsonl",
    terms=Registry("term", "kdgraft.nlp.terms", parent=TERMS, home="kdgraft_nlp:TERMS"),
    recipes=Registry("recipe", "kdgraft.nlp.recipes", parent=RECIPES, home="kdgraft_nlp:RECIPES"),
    sources=Registry("source", "kdgraft.nlp.sources", parent=SOURCES, home="kdgraft_nlp:SOURCES"),
    lacks={
        "boxes": "data of the Trainer have none but those of detectors; there use FeatureImitation with region='foreground', otherwise "
        "MaskedGeneration for maps, HiddenStates for tokens",
        "generators": "models of the Trainer have losses of their own and make no images; generators are models of plain PyTorch",
    },
    refuses={"ensemble": "a recipe builds one model; make the ensemble the teacher of a run"},
)
TORCH = Host(
    "torch",
    package="kdgraft",
    framework="torch",
    trainer="kdgraft.plain:TRAINER",
    suffixes=(".py",),
    benchmark="kdgraft_bench.hosts.torch:PlainBench",
    data="train/CLASS/*.jpg",
    terms=TERMS,
    recipes=RECIPES,
)
