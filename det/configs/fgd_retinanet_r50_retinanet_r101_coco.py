"""FGD's published pair: RetinaNet-R101 teaches RetinaNet-R50, which inherits its pyramid and head (the inheriting strategy)."""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth"

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    teacher=dict(config="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py", checkpoint=teacher_checkpoint),
    recipe="fgd",
    inherit=["neck", "bbox_head"],
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
