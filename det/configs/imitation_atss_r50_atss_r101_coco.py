"""ATSS-R101 teaches ATSS-R50: features and classes, as box edges that are predicted as numbers have no distributions to distil."""

_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "atss_r101_fpn_1x_20200825-dfcadd6f.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    teacher=dict(config="mmdet::atss/atss_r101_fpn_1x_coco.py", checkpoint=teacher_checkpoint),
    terms=[
        dict(type="FeatureImitation", tap="neck[*]", region="foreground", weight=1.0),
        dict(type="SoftTargets", weight=1.0),
    ],
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
