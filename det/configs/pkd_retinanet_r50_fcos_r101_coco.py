"""Across detector families (PKD, arXiv 2207.02039): FCOS R101 teaches RetinaNet R50; both have strides 8 to 128, and each level has weight 10."""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "fcos_r101_caffe_fpn_gn-head_1x_coco-0e37b982.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    teacher=dict(config="mmdet::fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py", checkpoint=teacher_checkpoint),
    recipe=dict(type="pkd", weight=10.0),
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
