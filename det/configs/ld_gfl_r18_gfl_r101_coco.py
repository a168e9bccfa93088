"""LD's published pair: GFL-R101 (24 epochs, multi-scale) teaches GFL-R18 (12 epochs). arXiv 2102.12252, table 3."""

_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    backbone=dict(depth=18, init_cfg=dict(checkpoint="torchvision://resnet18")),
    neck=dict(in_channels=[64, 128, 256, 512]),
    teacher=dict(config="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py", checkpoint=teacher_checkpoint),
    recipe="ld",
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
