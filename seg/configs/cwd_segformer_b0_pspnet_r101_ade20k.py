"""A convolutional teacher (PSPNet-R101) teaches a transformer student (SegFormer-B0) on ADE20K."""

_base_ = "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
data_root = "data/ade/ADEChallengeData2016"
teacher_checkpoint = "pspnet_r101-d8_512x512_160k_ade20k_20200615_100650-967c316f.pth"

custom_imports = dict(imports=["kdgraft_seg"], allow_failed_imports=False)
model = dict(
    type="DistilledSegmentor",
    student=_base_.model.type,
    teacher=dict(config="mmseg::pspnet/pspnet_r101-d8_4xb4-160k_ade20k-512x512.py", checkpoint=teacher_checkpoint),
    recipe="cwd",
)

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
