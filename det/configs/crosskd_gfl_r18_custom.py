"""Your own data in COCO format, with your own classes.

Set the variables, train the teacher first (a plain GFL-R50: mmdet's config with the same data and classes), then this config.
"""

_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
data_root = "data/custom/"
train_annotations = "annotations/instances_train.json"
val_annotations = "annotations/instances_val.json"
train_images = "train/"
val_images = "val/"
classes = ("first", "second", "third")  # as the annotation files name them
teacher_checkpoint = "teacher.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    backbone=dict(depth=18, init_cfg=dict(checkpoint="torchvision://resnet18")),
    neck=dict(in_channels=[64, 128, 256, 512]),
    bbox_head=dict(num_classes=len(classes)),
    # The teacher is the base's own GFL-R50 with these classes; config takes a whole model as well as a path.
    teacher=dict(
        config=dict(_base_.model, bbox_head=dict(_base_.model.bbox_head, num_classes=len(classes))),
        checkpoint=teacher_checkpoint,
    ),
    recipe="crosskd",  # closed most of the gap on a real set; others: kdgraft list
)

metainfo = dict(classes=classes)
train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, ann_file=train_annotations, data_prefix=dict(img=train_images))
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, ann_file=val_annotations, data_prefix=dict(img=val_images))
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_annotations)
test_evaluator = val_evaluator
