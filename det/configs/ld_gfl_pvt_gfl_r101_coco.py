"""Across backbone families: a convolutional teacher (GFL-R101) teaches a transformer student (GFL on PVT-Tiny)."""

_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth"
student_pretrained = "https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    backbone=dict(
        _delete_=True,
        type="PyramidVisionTransformer",
        num_layers=[2, 2, 2, 2],
        init_cfg=dict(checkpoint=student_pretrained),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
    teacher=dict(config="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py", checkpoint=teacher_checkpoint),
    recipe="ld",
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, weight_decay=0.0001))

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
