"""A teacher at a higher resolution (Chen et al., NeurIPS 2017, section 4.3): 1333×800 for the teacher, half of it for the student.

The training pipeline is the base's and delivers the teacher's images, from which the student's are made. The student's test
pipeline has its own size. (The region proposal network is not distilled, as its anchors lie on different grids.)
"""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
data_root = "data/coco/"
teacher_checkpoint = "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth"
student_size = (667, 400)

custom_imports = dict(imports=["kdgraft_det"], allow_failed_imports=False)
model = dict(
    type="DistilledDetector",
    student=_base_.model.type,
    teacher=dict(config="mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", checkpoint=teacher_checkpoint, scale=2.0),
    recipe="chen2017",
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=student_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
