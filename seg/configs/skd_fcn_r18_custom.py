"""Your own data in mmseg's layout, with your own classes (255 in a mask is ignored).

Set the variables, train the teacher first (a plain FCN-R50: mmseg's config with the same data and classes), then this config.
"""

_base_ = "mmseg::fcn/fcn_r50-d8_4xb2-80k_cityscapes-512x1024.py"
data_root = "data/custom/"
train_images, train_masks = "img_dir/train", "ann_dir/train"
val_images, val_masks = "img_dir/val", "ann_dir/val"
image_suffix, mask_suffix = ".jpg", ".png"
classes = ("first", "second", "third")
crop_size = (256, 256)
teacher_checkpoint = "teacher.pth"

custom_imports = dict(imports=["kdgraft_seg"], allow_failed_imports=False)
data_preprocessor = dict(size=crop_size)
model = dict(
    type="DistilledSegmentor",
    student=_base_.model.type,
    data_preprocessor=data_preprocessor,
    pretrained="open-mmlab://resnet18_v1c",
    backbone=dict(depth=18),
    decode_head=dict(in_channels=512, channels=128, num_classes=len(classes)),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=len(classes)),
    # The teacher is the base's own FCN-R50 with these classes; config takes a whole model as well as a path.
    teacher=dict(
        config=dict(
            _base_.model,
            decode_head=dict(_base_.model.decode_head, num_classes=len(classes)),
            auxiliary_head=dict(_base_.model.auxiliary_head, num_classes=len(classes)),
        ),
        checkpoint=teacher_checkpoint,
    ),
    recipe="skd",
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
custom = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix=image_suffix,
    seg_map_suffix=mask_suffix,
    reduce_zero_label=False,
)
train_dataloader = dict(
    dataset=dict(
        custom,
        _delete_=True,
        data_prefix=dict(img_path=train_images, seg_map_path=train_masks),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        custom, _delete_=True, data_prefix=dict(img_path=val_images, seg_map_path=val_masks), pipeline=test_pipeline
    )
)
test_dataloader = val_dataloader
