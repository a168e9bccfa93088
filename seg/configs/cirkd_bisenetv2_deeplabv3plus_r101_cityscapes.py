"""Across model families: DeepLabV3+ on ResNet-101 teaches the real-time BiSeNetV2. The recipe is CIRKD's, arXiv 2204.06986."""

_base_ = "mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py"
data_root = "data/cityscapes/"
teacher_checkpoint = "deeplabv3plus_r101-d8_512x1024_80k_cityscapes_20200606_114143-068fcfe9.pth"

custom_imports = dict(imports=["kdgraft_seg"], allow_failed_imports=False)
model = dict(
    type="DistilledSegmentor",
    student=_base_.model.type,
    teacher=dict(
        config="mmseg::deeplabv3plus/deeplabv3plus_r101-d8_4xb2-80k_cityscapes-512x1024.py",
        checkpoint=teacher_checkpoint,
    ),
    recipe="cirkd",
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
