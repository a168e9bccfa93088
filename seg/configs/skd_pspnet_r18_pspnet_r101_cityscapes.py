"""Structured KD's published pair: PSPNet-R101 teaches PSPNet-R18 on Cityscapes. arXiv 1903.04197."""

_base_ = "mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py"
data_root = "data/cityscapes/"
teacher_checkpoint = "pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth"

custom_imports = dict(imports=["kdgraft_seg"], allow_failed_imports=False)
model = dict(
    type="DistilledSegmentor",
    student=_base_.model.type,
    teacher=dict(config="mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py", checkpoint=teacher_checkpoint),
    recipe="skd",
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
