"""Chen et al. (NeurIPS 2017) for two stages: Faster R-CNN R101 teaches R50, on the pyramid, in the RPN and on the student's sampled proposals."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    teacher=dict(config="mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py", checkpoint=teacher_checkpoint),
    recipe=dict(type="chen2017", two_stage=True),
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
